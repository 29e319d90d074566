"""One AdamW step over every parameter at once: gradient norm, clipping, decay, update, rounded copy.

    g = coefficient * grad,   coefficient = min(1, max_norm / (norm + 1e-6)) / grad_scale
    exp_avg    += (1 - beta1) * (g - exp_avg)
    exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * g^2
    param       = param * (1 - lr * weight_decay)
                - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

The norm is of all gradients together, divided by grad_scale, what the loss was multiplied by (1 if nothing is said).
A step that loss scaling has to leave out changes nothing, and nobody waits for the device to know it.

This is torch.optim.AdamW after torch.nn.utils.clip_grad_norm_ (Loshchilov, Hutter 2019, arXiv:1711.05101). The
kernels reach the tensors through a table of addresses, so gradients that autograd allocated anew are no matter:
each number is read and written once, and once more read where a norm is wanted. A bfloat16 or float16 parameter has
float32 state and a float32 master, which is what is updated; the parameter is its rounded copy, made in the same
pass. torch updates such a parameter in its own precision, where small steps are lost.

An element of the parameter that is not its master's rounding, bit for bit, was written by somebody since: a step begins
from it (`take_written`). The kernels compare as they go, which reads the parameter once more; a version counter would
miss what is written through `.data`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2_fast.ops.adamw_contract import OP, Lists, check, check_numbers, refuse_overlap, refuse_what_kernels_cannot
from gpt2_fast.ops.adamw_kept import Kept
from gpt2_fast.ops.adamw_table import ALIGNMENT, CHUNK, Row, chunk_rows, device_table, table_rows
from gpt2_fast.ops.runtime import cpp, dispatch
from gpt2_fast.ops.runtime.dispatch import LOW_PRECISION
from gpt2_fast.ops.runtime.library import register
from gpt2_fast.ops.runtime.tracing import is_odd, traced

dispatch.TABLE[OP] = {"cuda": ("triton", "reference"), "cpu": ("cpp", "reference")}


def grad_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, float32 (float64 if one of them is)."""
    if not grads:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.contiguous(), dtype=wide) for g in grads]))


def take_written(master: Tensor, param: Tensor) -> None:
    """master becomes param where param is not its rounding, bit for bit; param: bfloat16 or float16.

    So 0 written over a master that rounds to 0 is not seen, nor inf over one that overflows float16. A NaN needs no
    care: whichever of the two it was, the master becomes one.
    """
    same = param.view(torch.int16) == master.to(param.dtype).view(torch.int16)
    master.copy_(torch.where(same, master, param.to(master.dtype)))


def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    groups: Sequence[int],
    hyper: Tensor,
    *,
    max_norm: float | None = None,
    norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor | None:
    """What is correct: see `adamw`. Any device, floating dtype and strides."""
    if max_norm is not None:
        norm = _unscaled(grad_norm_reference(grads), grad_scale) if norm is None else norm.reshape(())
    if (skipped := _skipped(norm, grad_scale, found_inf)) is not None:
        changed = [*exp_avgs, *exp_avg_sqs, *masters, *params]
        before = [t.clone() for t in changed]
    masters, coefficient = iter(masters), None
    if max_norm is not None:
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if grad_scale is not None:
        coefficient = (1.0 if coefficient is None else coefficient) / grad_scale.reshape(())
    for p, grad, m, v, step, group in zip(params, grads, exp_avgs, exp_avg_sqs, steps, groups, strict=True):
        lr, beta1, beta2, eps, weight_decay, maximize = hyper[group].unbind()
        weight = next(masters) if p.dtype in LOW_PRECISION else p
        if weight is not p:
            take_written(weight, p)
        g = grad.to(m.dtype)
        g = torch.where(maximize != 0, -g, g)
        g = g if coefficient is None else g * coefficient
        m.add_((g - m) * (1.0 - beta1))
        v.mul_(beta2).add_(g * g * (1.0 - beta2))
        count = step.double().reshape(())
        root = v.sqrt() / (1.0 - beta2**count).sqrt()
        weight.mul_(1.0 - lr * weight_decay).sub_(m / (root + eps) * (lr / (1.0 - beta1**count)))
        if weight is not p:
            p.copy_(weight)
    if skipped is not None:
        for t, old in zip(changed, before, strict=True):
            t.copy_(torch.where(skipped, old, t))
    return norm if max_norm is not None else None


def _unscaled(norm: Tensor, grad_scale: Tensor | None) -> Tensor:
    return norm if grad_scale is None else norm / grad_scale.reshape(())


def _skipped(norm: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor | None:
    """Whether nothing may change, a bool scalar on the device; None where no loss was scaled."""
    found = [] if found_inf is None else [found_inf.reshape(()) != 0]
    if grad_scale is not None and norm is not None:
        found.append(~norm.isfinite())
    return functools.reduce(torch.logical_or, found) if found else None


def left_out(norm: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor | None:
    """Whether a step with these changed nothing, 1 or 0, a float32 scalar on the device; None where no loss was scaled.

    norm: what `adamw` returned.
    """
    skipped = _skipped(norm, grad_scale, found_inf)
    return None if skipped is None else skipped.float()


def _step_cpp(rows, hyper, norm, max_norm, grad_scale, found_inf):
    table = {"table": torch.tensor(rows, dtype=torch.int64, device="cpu"), "tensors": len(rows), "chunk": CHUNK}
    table["chunks"] = rows[-1].first_chunk + rows[-1].chunks
    if max_norm is not None and norm is None:
        norm = torch.empty((), dtype=torch.float32, device="cpu")
        cpp.adamw_grad_norm(**table, partial=torch.empty(table["chunks"], dtype=torch.float64, device="cpu"), norm=norm)
        norm = _unscaled(norm, grad_scale)
    limit = -1.0 if max_norm is None else max_norm
    cpp.adamw_update(**table, hyper=hyper, norm=norm, max_norm=limit, grad_scale=grad_scale, found_inf=found_inf)
    return norm


def _step_triton(rows, hyper, norm, max_norm, grad_scale, found_inf):
    from gpt2_fast.kernels import adamw as kernel

    table = device_table(rows, hyper.device)
    chunks = chunk_rows(tuple(row.numel for row in rows), hyper.device)
    # A step is one number and is loaded alone; what is streamed must be aligned for wide loads.
    streamed = ((row.param, row.grad, row.exp_avg, row.exp_avg_sq, row.master) for row in rows)
    aligned = all(address % ALIGNMENT == 0 for addresses in streamed for address in addresses)
    if max_norm is not None and norm is None:
        norm = hyper.new_empty(1, dtype=torch.float32)
        kernel.grad_norm(table, chunks, norm, aligned, CHUNK)
        norm = _unscaled(norm.reshape(()), grad_scale)
    limit, clip_to = 0.0 if max_norm is None else max_norm, None if max_norm is None else norm
    kernel.step(table, chunks, hyper, clip_to, limit, aligned, CHUNK, grad_scale, found_inf)
    return norm


_STEP = {"cpp": _step_cpp, "triton": _step_triton}


def _run(
    params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups, hyper, norm, max_norm, grad_scale, found_inf, impl
):
    rows, _copies = _table(Lists(params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups))
    return _update(rows, hyper, norm, max_norm, grad_scale, found_inf, impl)


def _table(lists: Lists) -> tuple[tuple[Row, ...], list[Tensor]]:
    """The table, and the gradients that it has: of one that is not contiguous a copy, which nothing else keeps."""
    grads = [g.contiguous() for g in lists.grads]
    lists = lists._replace(grads=grads)
    refuse_overlap(*lists[:-1])
    return table_rows(*lists), grads


def _update(rows: tuple[Row, ...], hyper, norm, max_norm, grad_scale, found_inf, impl: str) -> Tensor:
    given = None if norm is None else norm.to(torch.float32, copy=True).reshape(())
    if rows:
        norm = _STEP[impl](rows, hyper.contiguous(), given, max_norm, grad_scale, found_inf)
    else:
        norm = hyper.new_zeros((), dtype=torch.float32) if given is None else given
    return hyper.new_empty(0, dtype=torch.float32) if max_norm is None else norm


def _fake(
    params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups, hyper, norm, max_norm, grad_scale, found_inf, impl
):
    return hyper.new_empty(0 if max_norm is None else (), dtype=torch.float32)


# norm: given, or made here when max_norm is not None. Returns it, or an empty tensor where there is no clipping.
_operator = register(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters,"
    " Tensor[] steps, int[] groups, Tensor hyper, Tensor? norm, float? max_norm, Tensor? grad_scale,"
    " Tensor? found_inf, str impl) -> Tensor",
    _run,
    _fake,
)


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    groups: Sequence[int],
    hyper: Tensor,
    *,
    max_norm: float | None = None,
    norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str = "auto",
    kept: Kept | None = None,
) -> Tensor | None:
    """Updates params, exp_avgs, exp_avg_sqs and masters in place.

    Args:
        params, grads: tensors of one device, a grad in its param's dtype. Kernels want params contiguous.
        exp_avgs, exp_avg_sqs: the running averages, float32 (the reference: or float64), contiguous.
        masters: the float32 weights of the bfloat16 and float16 params alone, in their order. An element whose param is
            not its rounding, bit for bit, is taken from the param first.
        steps: float32 scalars on the device, already counting this step.
        groups: for each param, its row of `hyper`.
        hyper: float64 [groups, 6] on the device, columns `adamw_contract.HYPERPARAMETERS`.
        max_norm: gradients are scaled to this 2-norm, all of them together, where they exceed it. None: no norm is
            computed; inf: it is, and nothing is scaled.
        norm: the norm to clip by, where other gradients count too, divided by grad_scale; by default that of `grads`.
        grad_scale: what the loss was multiplied by, one float32 on the device: gradients are divided by it. Where a
            norm is taken, a step whose norm is not finite changes nothing.
        found_inf: one float32 on the device; unless it is 0, nothing changes (as of torch.amp.GradScaler).
        impl: see `gpt2_fast.ops.runtime.dispatch`.
        kept: an optimizer's, where its next steps are likely to have the same tensors but for the gradients.

    Returns:
        The norm before clipping, divided by grad_scale, a float32 scalar on the device; None when max_norm is None.
        `grads` are unchanged, and `steps` in any case.

    Raises:
        ValueError: lists, shapes, dtypes, devices or strides that do not fit; tensors that share memory.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    lists = Lists(params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups)
    return _checked(lists, hyper, max_norm, _Numbers(norm, grad_scale, found_inf), impl, kept)()


class _Numbers(NamedTuple):
    """The tensors of one number that `adamw` takes, or None."""

    norm: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None


def checked(
    collected: dict[str, Lists],
    hyper: Tensor,
    kept: dict[str, Kept],
    *,
    max_norm: float | None,
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> list[Callable[[], Tensor | None]]:
    """An optimizer's step as calls that take it and give what `adamw` does. Before the first, nothing is written.

    Args:
        collected: what each implementation updates.
        kept: of each implementation; new ones are added.
        hyper, max_norm, norm, grad_scale, found_inf: as of `adamw`.

    Raises as `adamw`, and ValueError for memory that parameters of two implementations share.
    """
    numbers = _Numbers(norm, grad_scale, found_inf)
    calls = [
        _checked(lists, hyper, max_norm, numbers, impl, kept.setdefault(impl, Kept()))
        for impl, lists in collected.items()
    ]
    if len(collected) > 1 and not torch.compiler.is_compiling():
        each = [lists if impl == "reference" else _read_in_place(lists) for impl, lists in collected.items()]
        _refuse_overlap_of_plain(Lists(*([t for lists in each for t in lists[i]] for i in range(len(Lists._fields)))))
    return calls


def _read_in_place(lists: Lists) -> Lists:
    """Without the gradients that kernels read a copy of."""
    nothing = torch.empty(0, device="cpu")
    return lists._replace(grads=[g if g.is_contiguous() and not is_odd(g) else nothing for g in lists.grads])


def _refuse_overlap_of_plain(lists: Lists) -> None:
    """`refuse_overlap`, unless there are tensors of which nobody knows where they lie."""
    if not any(is_odd(t) for tensors in lists[:-1] for t in tensors):
        refuse_overlap(*lists[:-1])


def _checked(
    lists: Lists, hyper: Tensor, max_norm: float | None, numbers: _Numbers, impl: str, kept: Kept | None
) -> Callable[[], Tensor | None]:
    """What `adamw` still has to do when all that it was given is found right."""
    check_numbers(hyper, numbers._asdict(), max_norm)
    if torch.compiler.is_compiling():
        kept = None  # nobody knows where the tensors will lie
    found = None if kept is None else kept.take(impl, lists, hyper, numbers)
    table = None if found is None else (found[1], [])
    if found is not None:
        name = found[0]
    else:
        check(*lists, hyper)
        if not lists.params:
            norm = hyper.new_zeros(()) if numbers.norm is None else numbers.norm
            return lambda: None if max_norm is None else norm.to(torch.float32, copy=True).reshape(())
        name = dispatch.choose(OP, impl, lists.params[0].device, lists.params[0].dtype)
        if name == "reference":
            if not torch.compiler.is_compiling():
                refuse_overlap(*lists[:-1])
            return lambda: adamw_reference(*lists, hyper, max_norm=max_norm, **numbers._asdict())
        refuse_what_kernels_cannot(name, lists.params, lists.masters, lists.exp_avgs, lists.exp_avg_sqs)
        if kept is not None:
            if traced([*(t for tensors in lists[:-1] for t in tensors), hyper, *numbers]):
                _refuse_overlap_of_plain(_read_in_place(lists))  # the operator does it too, after steps are counted
            else:
                table = _table(lists)
            kept.note(impl, lists, hyper, name)
    return lambda: _take_step(lists, table, hyper, max_norm, numbers, name)


def _take_step(lists: Lists, table, hyper: Tensor, max_norm: float | None, numbers: _Numbers, name: str):
    """table: as `_table` gives it; None: the operator makes it."""
    if table is None:
        norm, *scaling = numbers
        result = _operator(*map(list, lists), hyper, norm, max_norm, *scaling, name)
    else:
        result = _update(table[0], hyper, numbers.norm, max_norm, numbers.grad_scale, numbers.found_inf, name)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(lists.params)  # a backward that needs the old values then says so
    return None if max_norm is None else result


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (the lists of `adamw`, hyper, options) that tests and benchmarks read, smallest first."""
    generator = torch.Generator().manual_seed(0)
    for shapes, max_norm in [([(1,)], None), ([(3, 5), (96,), (0,), (33, 96)], 0.5), ([(70, 130), (20,)], 1e9)]:
        params = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        grads = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        exp_avgs = [torch.randn(s, generator=generator, dtype=torch.float32).to(device) * 0.1 for s in shapes]
        exp_avg_sqs = [torch.rand(s, generator=generator, dtype=torch.float32).to(device) for s in shapes]
        masters = [p.float() for p in params] if dtype in LOW_PRECISION else []
        steps = [torch.tensor(float(i + 1), dtype=torch.float32, device=device) for i in range(len(shapes))]
        hyper = torch.tensor([[1e-2, 0.9, 0.95, 1e-8, 0.1, 0], [3e-3, 0.8, 0.999, 1e-6, 0, 1]], dtype=torch.float64)
        groups = [i % 2 for i in range(len(shapes))]
        lists = (params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups)
        yield (*lists, hyper.to(device), {"max_norm": max_norm})


def cost(numel: int, itemsize: int, clip: bool = True) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one step over `numel` elements in parameters of `itemsize` bytes.

    Read and written: both averages and the float32 weights. Read: the gradient, once more for its norm, which must
    be known before the first update. Read and written: the rounded copy of a low-precision parameter.
    """
    per_element = 24 + itemsize * (1 + clip) + (2 * itemsize if itemsize < 4 else 0)
    return {"forward": {"bytes": numel * per_element, "flops": (15 + 2 * clip) * numel}}
