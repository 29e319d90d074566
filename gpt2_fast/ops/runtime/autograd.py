"""The autograd.Functions of a declared operation, as it runs, as it is traced and for torch.func, and the second
derivative that raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2_fast.ops.runtime.philox import Dropout
from gpt2_fast.ops.runtime.tracing import refuse_tangents, several_at_once, tangent, traced

if TYPE_CHECKING:
    from gpt2_fast.ops.runtime.declare import Op


def _one_by_one(function, info, in_dims, flat, count: int):
    """vmap of `function`, whose outputs are `count` tensors: over the samples, in order."""
    samples = []
    for i in range(info.batch_size):
        sample = (t.select(dim, i) if isinstance(dim, int) else t for t, dim in zip(flat, in_dims, strict=True))
        samples.append(function.apply(*sample))
    return tuple(map(torch.stack, zip(*samples, strict=True))), (0,) * count


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What an operator returns, always as a tuple."""
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def by_name(names: Sequence[str], outputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor | None]:
    """What an operator returned, by name; None for what it did not make."""
    return {name: t if t.numel() else None for name, t in zip(names, as_tuple(outputs), strict=True)}


def _keep(op: Op, ctx, flat: tuple, outputs: dict[str, Tensor | None]) -> None:
    """Saves for backward what `op` names: of a call's flat arguments and its outputs."""
    named = dict(zip(op.names, flat))  # noqa: B905 - flat ends in the implementation
    named.update(outputs)
    kept = []
    for first, *others in op.saved_names:
        t = named[first]
        for name in others:
            t = named[name] if t is None else t
        # What kernels read as it is is kept as it is: a gradient is laid out as the weight was.
        kept.append(t if t is None or first in op.strided or t.is_contiguous() else t.contiguous())
    inputs = len(op.inputs)
    options = [*flat[inputs:-1]]
    for i in op.tensor_options:
        kept.append(options[i])
        options[i] = None
    kept += [named[name] for name in op.ahead]
    ctx.save_for_backward(*kept)
    first = named[op.returns[0]]
    ctx.options, ctx.carried, ctx.impl = options, op.carry_values(named), flat[-1]
    ctx.dtypes, ctx.first = [None if t is None else t.dtype for t in flat[:inputs]], (first.shape, first.dtype)
    ctx.set_materialize_grads(False)


def _zeros_first(what, grads: tuple[Tensor | None, ...], kept: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The upstream gradients with zeros for the first output's, where none came: kernels always read it."""
    like, (shape, dtype) = next(t for t in kept if t is not None), what.first
    return like.new_zeros(shape, dtype=dtype), *grads[1:]


def _gradients(op: Op, ctx, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What backward returns by way of the dispatcher: a gradient for each input that wants one, None for the others."""
    saved, options, count = ctx.saved_tensors, list(ctx.options), len(op.saved_names)
    kept, ahead = saved[:count], saved[count + len(op.tensor_options) :]
    for i, t in zip(op.tensor_options, saved[count:], strict=False):
        options[i] = t
    needs = ctx.needs_input_grad[: len(op.inputs)]
    grads = _zeros_first(ctx, grads, kept) if grads[0] is None else grads
    made = _dispatched(op, ctx, (*grads, *kept), options, needs, ahead, False)
    return *op.by_input(made, needs, ctx.dtypes), *(None,) * (len(options) + 1)


def _dispatched(op: Op, what, tensors, options, needs, ahead, in_place: bool) -> dict[str, Tensor | None]:
    """The gradients by name, by way of the dispatcher; or those that forward made `ahead`, scaled."""
    refuse_tangents(op.name, tensors)
    flat = (*tensors, *options, *what.carried, list(needs), what.impl)
    # This backward is recorded itself, or it is several at once, which go one by one there, each from what was saved.
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or several_at_once(tensors)):
        return by_name(op.made, op.underivable.apply(*flat))
    if any(g is not None for g in ahead):
        return op.rescale(ahead, flat, in_place)
    return by_name(op.made, op.backward_op(*flat))


def underivable_of(name: str, run: Callable, count: int, why: str) -> type[torch.autograd.Function]:
    """An operator of `count` outputs where a graph is recorded: to differentiate what comes out raises, and says why.

    It would otherwise be a derivative of zero, without a word.
    """

    class Underivable(torch.autograd.Function):
        @staticmethod
        def forward(*flat):
            return as_tuple(run(*flat))

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *_):
            raise RuntimeError(f"{name.removesuffix('_backward')}: {why}")

        @staticmethod
        def jvp(ctx, *_):
            raise tangent(name.removesuffix("_backward"))

        @staticmethod
        def vmap(info, in_dims, *flat):
            return _one_by_one(Underivable, info, in_dims, flat, count)

    Underivable.__name__ = Underivable.__qualname__ = name
    return Underivable


def function_of(op: Op) -> Callable[..., tuple[Tensor, ...]]:
    """The apply of a Function that takes a `Kind`, the call's dropout and the inputs, and returns what `op.returns`
    names. It is without Function.apply's search for what torch.func left: such a call is traced."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, kind, dropout, *tensors):
            made = kind.forward(tensors, dropout, ctx.needs_input_grad[2:])
            kind.save(ctx, tensors, made, dropout)
            return tuple([made[name] for name in op.returns])

        @staticmethod
        def backward(ctx, *grads):
            kind, saved, needs, dropout = ctx.kind, ctx.saved_tensors, ctx.needs_input_grad[2:], None
            kind.check_kept(saved)
            if kind.drops:
                *saved, key = saved
                dropout = Dropout(kind.p, key, ctx.site)
            grads = _zeros_first(kind, grads, saved) if grads[0] is None else grads
            tensors, ahead = (*grads, *saved), ()
            if op.ahead:
                ahead, ctx.ahead = ctx.ahead, ()
            if ahead or torch.is_grad_enabled() or traced(tensors) or several_at_once(grads):
                made = _dispatched(op, kind, tensors, kind.flat_options(dropout), needs, ahead, True)
            else:
                made = kind.backward(tensors, dropout, needs)
            return None, None, *op.by_input(made, needs, kind.dtypes)

    Function.__name__ = Function.__qualname__ = op.name
    return super(torch.autograd.Function, Function).apply


def traced_of(op: Op) -> type[torch.autograd.Function]:
    """Its apply takes the inputs, the flat options and the implementation, and returns what `op.returns` names."""

    class Traced(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *flat):
            needs = ctx.needs_input_grad[: len(op.inputs)]
            ask = list(needs) if op.ahead else any(needs)
            outputs = by_name(op.output_names, op.forward_op(*flat[:-1], ask, flat[-1]))
            _keep(op, ctx, flat, outputs)
            return tuple([outputs[name] for name in op.returns])

        @staticmethod
        def backward(ctx, *grads):
            return _gradients(op, ctx, grads)

    Traced.__name__ = Traced.__qualname__ = op.name
    return Traced


def functional_of(op: Op) -> type[torch.autograd.Function]:
    """The same for torch.func: every output is returned, and vmap goes over the samples one by one."""

    class Functional(torch.autograd.Function):
        @staticmethod
        def forward(*flat):
            ask = [False] * len(op.inputs) if op.ahead else True  # nothing ahead: backward is recorded here
            return as_tuple(op.forward_op(*flat[:-1], ask, flat[-1]))

        @staticmethod
        def setup_context(ctx, inputs, output):
            constant = [o for n, o in zip(op.output_names, output, strict=True) if n not in op.returns]
            ctx.mark_non_differentiable(*constant)
            _keep(op, ctx, inputs, by_name(op.output_names, output))

        @staticmethod
        def backward(ctx, *grads):
            return _gradients(op, ctx, tuple(grads[op.output_names.index(name)] for name in op.returns))

        @staticmethod
        def jvp(ctx, *_):
            raise tangent(op.name)

        @staticmethod
        def vmap(info, in_dims, *flat):
            if op.drops(flat) and info.randomness != "same":
                raise RuntimeError(f"{op.name}: dropout under vmap is one mask for all samples; say randomness='same'")
            return _one_by_one(Functional, info, in_dims, flat, len(op.output_names))

    Functional.__name__ = Functional.__qualname__ = op.name
    return Functional
