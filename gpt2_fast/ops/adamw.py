"""One AdamW step over every parameter at once: gradient norm, clipping, decay, update, rounded copy.

    g = coefficient * grad,   coefficient = min(1, max_norm / (norm + 1e-6)),   norm over all gradients together
    exp_avg    += (1 - beta1) * (g - exp_avg)
    exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * g^2
    param       = param * (1 - lr * weight_decay)
                - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

This is torch.optim.AdamW after torch.nn.utils.clip_grad_norm_ (Loshchilov, Hutter 2019, arXiv:1711.05101). The
kernels reach the tensors through a table of addresses, so gradients that autograd allocated anew are no matter:
each number is read and written once, and once more read where a norm is wanted. A bfloat16 or float16 parameter has
float32 state and a float32 master, which is what is updated; the parameter is its rounded copy, made in the same
pass. torch updates such a parameter in its own precision, where small steps are lost.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.dispatch import DTYPE_CODES, KERNEL_DTYPES, LOW_PRECISION, address
from gpt2_fast.ops.runtime.library import define

OP = "adamw"
HYPERPARAMETERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")  # the columns of `hyper`
CHUNK = 8192  # elements of one tensor, what is summed alone and what one GPU program updates


def grad_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, float32 (float64 if one of them is)."""
    if not grads:
        return torch.zeros(())
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in grads]))


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
) -> Tensor | None:
    """What is correct: see `adamw`. Any device, floating dtype and strides."""
    masters = iter(masters)
    if max_norm is not None:
        norm = grad_norm_reference(grads) if norm is None else norm
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p, grad, m, v, step, group in zip(params, grads, exp_avgs, exp_avg_sqs, steps, groups, strict=True):
        lr, beta1, beta2, eps, weight_decay, maximize = hyper[group].unbind()
        weight = next(masters) if p.dtype in LOW_PRECISION else p
        g = grad.to(m.dtype) * torch.where(maximize != 0, -1.0, 1.0)
        g = g if max_norm is None else g * coefficient
        m.add_((g - m) * (1.0 - beta1))
        v.mul_(beta2).add_(g * g * (1.0 - beta2))
        count = step.double()
        root = v.sqrt() / (1.0 - beta2**count).sqrt()
        weight.mul_(1.0 - lr * weight_decay).sub_(m / (root + eps) * (lr / (1.0 - beta1**count)))
        if weight is not p:
            p.copy_(weight)
    return norm if max_norm is not None else None


# norm: given, or made here when max_norm is not None. Returns it, or an empty tensor where there is no clipping.
define(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters,"
    " Tensor[] steps, int[] groups, Tensor hyper, Tensor? norm, float? max_norm, str impl) -> Tensor"
)


@torch.library.register_fake("gpt2_fast::adamw")
def _(params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups, hyper, norm, max_norm, impl):
    return hyper.new_empty(0 if max_norm is None else (), dtype=torch.float32)


def _rows(params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups) -> tuple[tuple[int, ...], ...]:
    """The table that the kernels read, see csrc/adamw.h; empty tensors have no row."""
    masters, rows, first_chunk = iter(masters), [], 0
    for p, g, m, v, step, group in zip(params, grads, exp_avgs, exp_avg_sqs, steps, groups, strict=True):
        master = next(masters) if p.dtype in LOW_PRECISION else None
        if p.numel() == 0:
            continue
        tensors = (p, g, m, v, master, step)
        rows.append((*map(address, tensors), p.numel(), group, DTYPE_CODES[p.dtype], first_chunk))
        first_chunk += -(-p.numel() // CHUNK)
    return tuple(rows)


def _step_cpp(rows, hyper, norm, max_norm):
    extension = dispatch.extension()
    chunks = rows[-1][-1] - (-rows[-1][6] // CHUNK)
    table = torch.tensor(rows, dtype=torch.int64)
    if max_norm is not None and norm is None:
        norm, partial = torch.empty(()), torch.empty(chunks, dtype=torch.float64)
        extension.adamw_grad_norm(address(table), len(rows), chunks, CHUNK, address(partial), address(norm))
    limit = -1.0 if max_norm is None else max_norm
    extension.adamw_update(address(table), len(rows), chunks, CHUNK, address(hyper), address(norm), limit)
    return norm


# Pinned memory that a CUDA graph's copy of a table reads at every replay: taken from here while capturing, when
# none can be allocated, and kept for good.
_SPARE: dict[tuple[torch.device, int], Tensor] = {}
_CAPTURED: list[Tensor] = []


@functools.lru_cache(maxsize=8)
def _device_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The table on a GPU, without a host sync; the same addresses give the same tensor."""
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type != "cuda":
        return table
    key = (device, len(rows))
    if torch.cuda.is_current_stream_capturing():
        _CAPTURED.append(_SPARE.pop(key).copy_(table))
        return _CAPTURED[-1].to(device, non_blocking=True)
    if key not in _SPARE:
        _SPARE[key] = table.pin_memory()
    return table.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=8)
def _chunk_rows(numels: tuple[int, ...], device: torch.device) -> Tensor:
    from gpt2_fast.kernels import adamw as kernel

    return kernel.chunk_rows(list(numels), device, CHUNK)


def _step_triton(rows, hyper, norm, max_norm):
    from gpt2_fast.kernels import adamw as kernel

    table = _device_table(rows, hyper.device)
    chunk_rows = _chunk_rows(tuple(row[6] for row in rows), hyper.device)
    # A step is one number and is loaded alone; what is streamed must be aligned for wide loads.
    aligned = all(a % 16 == 0 for row in rows for a in row[:5])
    if max_norm is not None and norm is None:
        norm = hyper.new_empty(1, dtype=torch.float32)
        kernel.grad_norm(table, chunk_rows, norm, aligned, CHUNK)
        norm = norm.reshape(())
    limit = 0.0 if max_norm is None else max_norm
    kernel.step(table, chunk_rows, hyper, None if max_norm is None else norm, limit, aligned, CHUNK)
    return norm


_STEP = {"cpp": _step_cpp, "triton": _step_triton}


@torch.library.impl("gpt2_fast::adamw", ("CPU", "CUDA"))
def _(params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups, hyper, norm, max_norm, impl):
    grads = [g.contiguous() for g in grads]
    rows = _rows(params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups)
    given = None if norm is None else norm.to(torch.float32, copy=True)
    if rows:
        norm = _STEP[impl](rows, hyper, given, max_norm)
    else:
        norm = hyper.new_zeros((), dtype=torch.float32) if given is None else given
    return hyper.new_empty(0, dtype=torch.float32) if max_norm is None else norm


def unsupported(param: Tensor) -> str | None:
    """Why the kernels cannot update this parameter, None when they can; the reference updates any."""
    if param.dtype not in KERNEL_DTYPES:
        return f"its dtype is {param.dtype}; kernels take float32, bfloat16 and float16"
    if not param.is_contiguous():
        return f"it is not contiguous (strides {tuple(param.stride())})"
    return None


def _validate(params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups, hyper):
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "groups": groups}
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{OP}: {len(values)} {name} for {len(params)} params; one each")
    low = sum(p.dtype in LOW_PRECISION for p in params)
    if len(masters) != low:
        raise ValueError(f"{OP}: {len(masters)} masters for {low} bfloat16 and float16 params; one each, in order")
    if hyper.ndim != 2 or hyper.shape[1] != len(HYPERPARAMETERS) or hyper.dtype != torch.float64:
        raise ValueError(f"{OP}: hyper is {hyper.dtype} {tuple(hyper.shape)}; it must be float64 [groups, 6]")
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if g.is_sparse or g.shape != p.shape or g.dtype != p.dtype or g.device != p.device:
            raise ValueError(f"{OP}: grad {i} must be a dense {p.dtype} {tuple(p.shape)} on {p.device}, as its param")
        if m.shape != p.shape or v.shape != p.shape or m.dtype != v.dtype:
            raise ValueError(f"{OP}: exp_avg and exp_avg_sq {i} must have their param's shape {tuple(p.shape)}")
        if not 0 <= groups[i] < hyper.shape[0]:
            raise ValueError(f"{OP}: param {i} is in group {groups[i]} and hyper has {hyper.shape[0]}")


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
    impl: str = "auto",
) -> Tensor | None:
    """Updates params, exp_avgs, exp_avg_sqs and masters in place.

    Args:
        params, grads: tensors of one device, a grad in its param's dtype. Kernels want params contiguous.
        exp_avgs, exp_avg_sqs: the running averages, float32 (the reference: or float64), contiguous.
        masters: the float32 weights of the bfloat16 and float16 params alone, in their order.
        steps: float32 scalars on the device, already counting this step.
        groups: for each param, its row of `hyper`.
        hyper: float64 [groups, 6] on the device, columns HYPERPARAMETERS.
        max_norm: gradients are scaled to this 2-norm, all of them together, where they exceed it. None: no norm is
            computed; inf: it is, and nothing is scaled.
        norm: the norm to clip by, where other gradients count too; by default that of `grads`.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        The norm before clipping, a float32 scalar on the device; None when max_norm is None. `grads` are unchanged.

    Raises:
        ValueError: lists, shapes, dtypes or strides that do not fit.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    _validate(params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups, hyper)
    if not params:
        return None if max_norm is None else hyper.new_zeros((), dtype=torch.float32)
    name = dispatch.choose(OP, impl, params[0].device, params[0].dtype)
    lists = (params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups)
    if name == "reference":
        return adamw_reference(*lists, hyper, max_norm=max_norm, norm=norm)
    for i, p in enumerate(params):
        reason = unsupported(p)
        if reason is not None:
            raise ValueError(f"{OP}: impl={name!r} cannot update param {i}: {reason}; use impl='reference'")
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in (*exp_avgs, *exp_avg_sqs, *masters, *steps)):
        raise ValueError(f"{OP}: exp_avgs, exp_avg_sqs, masters and steps must be float32 and contiguous")
    result = torch.ops.gpt2_fast.adamw(*map(list, lists), hyper, norm, max_norm, name)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(params)  # a backward that still needs the old values then says so
    return None if max_norm is None else result


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (the lists of `adamw`, hyper, options) that tests and benchmarks read, smallest first."""
    generator = torch.Generator().manual_seed(0)
    for shapes, max_norm in [([(1,)], None), ([(3, 5), (96,), (0,), (33, 96)], 0.5), ([(70, 130), (20,)], 1e9)]:
        params = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        grads = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        exp_avgs = [torch.randn(s, generator=generator).to(device) * 0.1 for s in shapes]
        exp_avg_sqs = [torch.rand(s, generator=generator).to(device) for s in shapes]
        masters = [p.float() for p in params] if dtype in LOW_PRECISION else []
        steps = [torch.tensor(float(i + 1), device=device) for i in range(len(shapes))]
        hyper = torch.tensor([[1e-2, 0.9, 0.95, 1e-8, 0.1, 0], [3e-3, 0.8, 0.999, 1e-6, 0, 1]], dtype=torch.float64)
        groups = [i % 2 for i in range(len(shapes))]
        lists = (params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups)
        yield (*lists, hyper.to(device), {"max_norm": max_norm})


def cost(numel: int, itemsize: int, clip: bool = True) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one step over `numel` elements in parameters of `itemsize` bytes.

    Read and written: both averages and the float32 weights. Read: the gradient, once more for its norm, which must
    be known before the first update. Written: the rounded copy of a low-precision parameter.
    """
    per_element = 24 + itemsize * (1 + clip) + (itemsize if itemsize < 4 else 0)
    return {"forward": {"bytes": numel * per_element, "flops": (15 + 2 * clip) * numel}}
