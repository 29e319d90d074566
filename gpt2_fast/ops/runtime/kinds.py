"""Calls of one kind: what an operation's declaration says of them is worked out at the first one and kept.

Two calls are of one kind when their tensors have the same shapes, dtypes, devices and layouts, their options are equal
and of the same types, and the same implementation runs. Sizes, what is allocated, and where each kept tensor comes from
are then the same too: only tensors, and the key and site of a dropout, differ from call to call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gpt2_fast.ops.runtime.philox import Dropout
from gpt2_fast.ops.runtime.values import Arguments, Outputs, maker

if TYPE_CHECKING:
    from gpt2_fast.ops.runtime.declare import Op


class Way(NamedTuple):
    """Forward or backward of one kind."""

    constants: dict[str, Any]  # every argument that is no tensor, by name
    makers: dict[str, Callable[[], Tensor] | None]  # of what is to be written


class Kind:
    """The calls of `op` with one implementation, the shapes and dtypes of `tensors`, and equal options.

    flat: tensors, flat options and the implementation, as the operator takes them. No tensor of it is kept.
    """

    def __init__(self, op: Op, tensors: Sequence[Tensor | None], flat: Sequence[Any]):
        self.op, self.impl, count = op, flat[-1], len(tensors)
        self.options = [None if i in op.tensor_options else value for i, value in enumerate(flat[count:-1])]
        self.dtypes = [None if t is None else t.dtype for t in tensors]
        self.p = dict(zip(op.flat_options, self.options, strict=True)).get("dropout_p", 0.0)
        self.drops = self.p > 0.0
        self.plain = op.reads_as_is(tensors)  # whether kernels get all inputs as they are
        self.carried = op.carry_values(dict(zip(op.names, flat)))  # noqa: B905 - flat ends in the implementation
        self.kept: list[tuple[str | None, int, bool]] = []  # (an output, or None and an input; if contiguous)
        self.shapes: list[Sequence[int] | None] = []  # of what is kept
        self.first: tuple[Sequence[int], torch.dtype] | None = None  # shape and dtype of what is returned first
        self._forward: dict[Any, Way] = {}
        self._backward: dict[Any, Way] = {}

    def flat_options(self, dropout: Dropout | None) -> list[Any]:
        """The options as the operator takes them, with the key and the site of this call's dropout."""
        if not self.drops:
            return self.options
        given = dict(zip(self.op.flat_options, self.options, strict=True))
        return [*(given | {"dropout_key": dropout.key, "dropout_site": dropout.site}).values()]

    def forward(
        self, tensors: Sequence[Tensor | None], dropout: Dropout | None, needs: tuple[bool, ...]
    ) -> dict[str, Tensor | None]:
        """Every output by name, for the inputs that want a gradient."""
        op = self.op
        ask = needs if op.ahead else True in needs
        way = self._forward.get(ask)
        if way is None:
            flat = (*tensors, *self.flat_options(dropout), ask, self.impl)
            way = self._way(op.forward_arguments(flat), tensors, op.input_names, op.outputs)
            made = self._run(way, tensors, op.input_names, dropout, op.read_forward, 0)
            self._note(made)
            self._forward[ask] = way
            return made
        return self._run(way, tensors, op.input_names, dropout, None if self.plain else op.read_forward, 0)

    def backward(
        self, tensors: Sequence[Tensor | None], dropout: Dropout | None, needs: tuple[bool, ...]
    ) -> dict[str, Tensor | None]:
        """The gradients by name, from `tensors`: the upstream gradients and what was kept."""
        op = self.op
        asked = (needs, *[None if t is None else t.dtype for t in tensors[: len(op.returns)]])
        way = self._backward.get(asked)
        if way is None:
            flat = (*tensors, *self.flat_options(dropout), *self.carried, needs, self.impl)
            way = self._way(op.backward_arguments(flat), tensors, op.backward_tensors, op.gradients)
            self._backward[asked] = way
        return self._run(way, tensors, op.backward_tensors, dropout, op.read_backward, 1)

    def save(self, ctx: Any, tensors: Sequence[Tensor | None], made: dict[str, Tensor | None], dropout: Any) -> None:
        """Keeps for backward what the operation names of a call's inputs and of what forward made."""
        kept = []
        for output, index, contiguous in self.kept:
            t = tensors[index] if output is None else made[output]
            kept.append(t.contiguous() if contiguous and t is not None and not t.is_contiguous() else t)
        if self.drops:  # saved, so that autograd notices when a key was written over
            kept.append(dropout.key)
            ctx.site = dropout.site
        if self.op.ahead:
            # Not saved: it would still be referenced when autograd decides whether it may keep it as a parameter's
            # gradient.
            ahead = [made[name] for name in self.op.ahead]
            ctx.ahead = ahead if any(g is not None for g in ahead) else ()
        if not self.shapes:
            self.shapes = [None if t is None else t.shape for t in kept]
        ctx.save_for_backward(*kept)
        ctx.kind = self
        ctx.set_materialize_grads(False)

    def check_kept(self, saved: Sequence[Tensor | None]) -> None:
        """Raises RuntimeError where torch gives back other shapes than `save` kept: sizes are not read again."""
        if [None if t is None else t.shape for t in saved] != self.shapes:
            raise RuntimeError(
                f"{self.op.name}: a tensor kept for backward came back in another shape; what saved_tensors_hooks "
                "unpack has to be what they packed"
            )

    def _way(self, a: Arguments, tensors, names: Sequence[str], specs: Callable[[Arguments], dict[str, Any]]) -> Way:
        makers = {name: maker(tensors[0], spec) for name, spec in specs(a).items()}
        of_a_call = {*names, *(("dropout", "dropout_key", "dropout_site") if self.drops else ())}
        return Way({name: value for name, value in a.named().items() if name not in of_a_call}, makers)

    def _run(self, way: Way, tensors, names, dropout, read, which: int) -> dict[str, Tensor | None]:
        values = way.constants.copy()
        values.update(zip(names, tensors, strict=True))
        if self.drops:
            values["dropout"], values["dropout_key"], values["dropout_site"] = dropout, dropout.key, dropout.site
        if read is not None:
            read(values)
        out = Outputs(way.makers)
        self.op.backends[self.impl][which](Arguments(values), out)
        made = out.named()
        del made["_makers"]
        return made

    def _note(self, made: dict[str, Tensor | None]) -> None:
        """Where what is kept comes from: "h|x" is the output h, or the input x where no h was made."""
        op, kept = self.op, []
        inputs = {name: i for i, name in enumerate(op.input_names)}
        for names in op.saved_names:
            there = [n for n in names if (made[n] is not None if n in made else self.dtypes[inputs[n]] is not None)]
            name, contiguous = (there or names)[0], names[0] not in op.strided
            kept.append((name, 0, contiguous) if name in made else (None, inputs[name], contiguous))
        first = made[op.returns[0]]
        self.kept, self.first = kept, (first.shape, first.dtype)
