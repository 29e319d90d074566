"""The autograd.Function of a declared operation, its twin for torch.func, and the second derivative that raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
    if op.ahead:
        # A gradient made ahead is not saved: it would still be referenced when autograd decides whether it may keep it
        # as a parameter's gradient. A compiler keeps what a graph saves, and copies.
        ctx.ahead = [named[name] for name in op.ahead]
        if torch.compiler.is_compiling():
            kept += ctx.ahead
            ctx.ahead = []
    ctx.save_for_backward(*kept)
    first = named[op.returns[0]]
    ctx.options, ctx.carried, ctx.impl = options, op.carry_values(named) if op.carry else (), flat[-1]
    ctx.dtypes, ctx.first = [None if t is None else t.dtype for t in flat[:inputs]], (first.shape, first.dtype)
    ctx.set_materialize_grads(False)


def _gradients(op: Op, ctx, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What backward returns: a gradient for each input that wants one, None for everything else."""
    saved, options, count = ctx.saved_tensors, ctx.options, len(op.saved_names)
    kept, saved = saved[:count], saved[count:]
    if op.tensor_options:
        options = list(options)
        for i, t in zip(op.tensor_options, saved, strict=False):
            options[i] = t
        saved = saved[len(op.tensor_options) :]
    in_place, ahead = False, ()
    if op.ahead:
        in_place, ahead, ctx.ahead = bool(ctx.ahead), ctx.ahead or saved, []
    needs = ctx.needs_input_grad[: len(op.inputs)]
    if grads[0] is None:
        like = next(t for t in kept if t is not None)
        grads = (like.new_zeros(ctx.first[0], dtype=ctx.first[1]), *grads[1:])
    flat = (*grads, *kept, *options, *ctx.carried, list(needs), ctx.impl)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # this backward is recorded itself
        made = by_name(op.made, op.underivable.apply(*flat))
    elif any(g is not None for g in ahead):
        made = op.rescale(ahead, flat, in_place)
    else:
        made = op.call_backward(flat)
    found = op.by_input(made)
    for i, dtype in enumerate(ctx.dtypes):
        g = found[i]
        if g is not None:
            found[i] = None if not needs[i] else g if g.dtype is dtype else g.to(dtype)
    return *found, *(None,) * (len(options) + 1)


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
        def vmap(info, in_dims, *flat):
            return _one_by_one(Underivable, info, in_dims, flat, count)

    Underivable.__name__ = Underivable.__qualname__ = name
    return Underivable


def function_of(op: Op) -> type[torch.autograd.Function]:
    """Its apply takes the inputs, the flat options and the implementation, and returns what `op.returns` names."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *flat):
            outputs = op.call(flat, ctx.needs_input_grad[: len(op.inputs)])
            _keep(op, ctx, flat, outputs)
            return tuple([outputs[name] for name in op.returns])

        @staticmethod
        def backward(ctx, *grads):
            return _gradients(op, ctx, grads)

    Function.__name__ = Function.__qualname__ = op.name
    return Function


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
        def vmap(info, in_dims, *flat):
            if op.drops(flat) and info.randomness != "same":
                raise RuntimeError(f"{op.name}: dropout under vmap is one mask for all samples; say randomness='same'")
            return _one_by_one(Functional, info, in_dims, flat, len(op.output_names))

    Functional.__name__ = Functional.__qualname__ = op.name
    return Functional
