"""AdamW (Loshchilov, Hutter 2019, arXiv:1711.05101) over every parameter in one launch, as torch.optim.AdamW:

    g = coefficient * grad,   coefficient = min(1, max_norm / (norm + 1e-6)) / grad_scale
    exp_avg    += (1 - beta1) * (g - exp_avg)
    exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * g^2
    param       = param * (1 - lr * weight_decay)
                - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

The tensors are reached through a table of addresses, cut into chunks, one program a chunk:

    table [tensors, 10] int64: param, grad, exp_avg, exp_avg_sq, master (0: none), step: addresses; numel;
        group; dtype of param and grad (0 float32, 1 bfloat16, 2 float16); first_chunk, the chunks of the rows
        before. exp_avg, exp_avg_sq and master are float32, step is one float32, already counting this step. A
        float32 param is its own master; the others need one. A step begins from the master where param is its
        rounding, bit for bit, and from param where it is not.
    chunk_rows [chunks] int32: the row of the table that a chunk belongs to, see `chunk_rows`.
    hyper [groups, 6] float64: lr, beta1, beta2, eps, weight_decay, maximize (0 or 1).

The norm is summed by chunk and then over the chunks in one fixed order: the same bits every time. The host
reads nothing back. What depends on a step or a group alone is computed in float64, so that 1 - beta^step is
exact enough at any step; what is done to an element is float32.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from . import tuning
from .aot import ARCHS, AotSpec, config_arch, make_spec
from .interpreter import cast
from .launch import launch

COLUMNS = tl.constexpr(10)
CHUNK = 8192  # elements a program, of what is compiled ahead; ops/adamw_table.py passes the same


@triton.jit
def _pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _sum_of_squares(
    grad_address, left, dtype: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):
    grad_ptr = _pointer(grad_address, dtype, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if left >= CHUNK:
        for at in tl.range(0, CHUNK, BLOCK):
            g = tl.load(grad_ptr + at + lanes).to(tl.float32)
            total += g * g
    else:
        for at in tl.range(0, left, BLOCK):
            g = tl.load(grad_ptr + at + lanes, mask=at + lanes < left, other=0.0).to(tl.float32)
            total += g * g
    return tl.sum(total, axis=0)


@triton.jit
def norm_partial_kernel(
    table_ptr,  # int64 [tensors, 10]
    chunk_rows_ptr,  # int32 [chunks]
    partial_ptr,  # float32 [chunks]
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    chunk = tl.program_id(0)
    row_ptr = table_ptr + tl.load(chunk_rows_ptr + chunk).to(tl.int64) * COLUMNS
    grad = tl.load(row_ptr + 1)
    start = (chunk - tl.load(row_ptr + 9)) * CHUNK
    left = tl.minimum(tl.load(row_ptr + 6) - start, CHUNK).to(tl.int32)
    dtype = tl.load(row_ptr + 8)
    if dtype == 0:
        total = _sum_of_squares(grad + start * 4, left, tl.float32, CHUNK, BLOCK, ALIGNED)
    elif dtype == 1:
        total = _sum_of_squares(grad + start * 2, left, tl.bfloat16, CHUNK, BLOCK, ALIGNED)
    else:
        total = _sum_of_squares(grad + start * 2, left, tl.float16, CHUNK, BLOCK, ALIGNED)
    tl.store(partial_ptr + chunk, total)


@triton.jit
def norm_total_kernel(
    partial_ptr,  # float32 [chunks]
    norm_ptr,  # float32 [1]
    chunks,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for at in tl.range(0, chunks, BLOCK):
        total += tl.load(partial_ptr + at + lanes, mask=at + lanes < chunks, other=0.0).to(tl.float64)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))


@triton.jit
def _update_block(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, at, left,
    sign, decay, average, keep, add, step_size, root_scale, eps,
    MASTER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of one tensor. MASTER: the weights are at master_ptr, param is their rounded copy.

    What of param is no such copy was written since, and its master begins from it. NaN: either way that is a NaN.
    """
    mask = at < left if MASKED else None
    weight_ptr = master_ptr if MASTER else param_ptr
    g = tl.load(grad_ptr + at, mask=mask).to(tl.float32) * sign
    m = tl.load(exp_avg_ptr + at, mask=mask)
    v = tl.load(exp_avg_sq_ptr + at, mask=mask)
    p = tl.load(weight_ptr + at, mask=mask)
    if MASTER:
        written = tl.load(param_ptr + at, mask=mask)
        copy = cast(p, param_ptr.dtype.element_ty)
        p = tl.where(written.to(tl.int16, bitcast=True) == copy.to(tl.int16, bitcast=True), p, written.to(tl.float32))
    m += average * (g - m)
    v = keep * v + add * g * g
    p = p * decay - step_size * (m / (tl.sqrt(v) * root_scale + eps))
    tl.store(exp_avg_ptr + at, m, mask=mask)
    tl.store(exp_avg_sq_ptr + at, v, mask=mask)
    tl.store(weight_ptr + at, p, mask=mask)
    if MASTER:
        tl.store(param_ptr + at, cast(p, param_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _update_chunk(
    row_ptr, start, left,
    sign, decay, average, keep, add, step_size, root_scale, eps,
    dtype: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    param_ptr = _pointer(tl.load(row_ptr) + start * SIZE, dtype, ALIGNED)
    grad_ptr = _pointer(tl.load(row_ptr + 1) + start * SIZE, dtype, ALIGNED)
    exp_avg_ptr = _pointer(tl.load(row_ptr + 2) + start * 4, tl.float32, ALIGNED)
    exp_avg_sq_ptr = _pointer(tl.load(row_ptr + 3) + start * 4, tl.float32, ALIGNED)
    master_ptr = _pointer(tl.load(row_ptr + 4) + start * 4, tl.float32, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    # A mask at a length that is not known to be a multiple of anything would keep loads from being vectors.
    if left >= CHUNK:
        for at in tl.range(0, CHUNK, BLOCK):
            _update_block(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, at + lanes, left,
                sign, decay, average, keep, add, step_size, root_scale, eps, SIZE != 4, False,
            )  # fmt: skip
    else:
        for at in tl.range(0, left, BLOCK):
            _update_block(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, at + lanes, left,
                sign, decay, average, keep, add, step_size, root_scale, eps, SIZE != 4, True,
            )  # fmt: skip


@triton.jit
def update_kernel(
    table_ptr,  # int64 [tensors, 10]
    chunk_rows_ptr,  # int32 [chunks]
    hyper_ptr,  # float64 [groups, 6]
    norm_ptr,  # float32 [1], divided by grad_scale already, or None: no clipping
    max_norm,
    grad_scale_ptr,  # float32 [1], what gradients are divided by, or None
    found_inf_ptr,  # float32 [1], nothing changes unless it is 0, or None: a norm that is not finite says so
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    if found_inf_ptr is not None:  # noqa: SIM102  # the outer condition is the compiler's
        if tl.load(found_inf_ptr) != 0.0:
            return
    if grad_scale_ptr is not None and norm_ptr is not None:  # noqa: SIM102
        if not (tl.load(norm_ptr) < float("inf")):
            return
    chunk = tl.program_id(0)
    row_ptr = table_ptr + tl.load(chunk_rows_ptr + chunk).to(tl.int64) * COLUMNS
    step_ptr = tl.load(row_ptr + 5).to(tl.pointer_type(tl.float32))
    start = (chunk - tl.load(row_ptr + 9)) * CHUNK
    left = tl.minimum(tl.load(row_ptr + 6) - start, CHUNK).to(tl.int32)
    group_ptr = hyper_ptr + tl.load(row_ptr + 7) * 6
    dtype = tl.load(row_ptr + 8)
    lr = tl.load(group_ptr)
    beta1 = tl.load(group_ptr + 1)
    beta2 = tl.load(group_ptr + 2)
    step = tl.load(step_ptr).to(tl.float64)
    step_size = (lr / (1.0 - tl.exp(step * tl.log(beta1)))).to(tl.float32)
    root_scale = (1.0 / tl.sqrt(1.0 - tl.exp(step * tl.log(beta2)))).to(tl.float32)
    decay = (1.0 - lr * tl.load(group_ptr + 4)).to(tl.float32)
    average = (1.0 - beta1).to(tl.float32)
    add = (1.0 - beta2).to(tl.float32)
    keep = beta2.to(tl.float32)
    eps = tl.load(group_ptr + 3).to(tl.float32)
    sign = tl.where(tl.load(group_ptr + 5) != 0.0, -1.0, 1.0)
    if norm_ptr is not None:
        coefficient = max_norm / (tl.load(norm_ptr) + 1e-6)
        # written so that a norm that is not a number clips to one that is not, as torch's clamp does
        sign *= tl.where(coefficient > 1.0, 1.0, coefficient)
    if grad_scale_ptr is not None:
        sign /= tl.load(grad_scale_ptr)
    if dtype == 0:
        _update_chunk(
            row_ptr, start, left, sign, decay, average, keep, add, step_size, root_scale, eps,
            tl.float32, 4, CHUNK, BLOCK, ALIGNED,
        )  # fmt: skip
    elif dtype == 1:
        _update_chunk(
            row_ptr, start, left, sign, decay, average, keep, add, step_size, root_scale, eps,
            tl.bfloat16, 2, CHUNK, BLOCK, ALIGNED,
        )  # fmt: skip
    else:
        _update_chunk(
            row_ptr, start, left, sign, decay, average, keep, add, step_size, root_scale, eps,
            tl.float16, 2, CHUNK, BLOCK, ALIGNED,
        )  # fmt: skip


def chunk_rows(numels: list[int], device: torch.device, chunk: int) -> torch.Tensor:
    """int32 [chunks]: the table row of every chunk, for tensors of `numels` elements laid end to end."""
    counts = torch.tensor([triton.cdiv(numel, chunk) for numel in numels])
    return torch.repeat_interleave(torch.arange(len(numels), dtype=torch.int32), counts).to(device)


def grad_norm(
    table: torch.Tensor,
    rows: torch.Tensor,
    norm: torch.Tensor,
    aligned: bool,
    chunk: int,
) -> None:
    """Writes the 2-norm of all gradients of the table into norm, float32 [1]. Two launches.

    rows: `chunk_rows` of the same chunk. aligned: whether every address of the table is a multiple of 16 (wider loads).
    """
    partial = partial_norms(table, rows, aligned, chunk)
    total = tuning.config("adamw", "total", config_arch(table.device))
    launch(norm_total_kernel, (1,), partial, norm, rows.numel(), **total)


def partial_norms(table: torch.Tensor, rows: torch.Tensor, aligned: bool, chunk: int) -> torch.Tensor:
    """The sum of squares of the gradients of each chunk, float32 [chunks]. One launch. Arguments: see `grad_norm`."""
    chunks, config = rows.numel(), _block("norm", table.device, chunk)
    partial = torch.empty(chunks, dtype=torch.float32, device=table.device)
    launch(norm_partial_kernel, (chunks,), table, rows, partial, CHUNK=chunk, ALIGNED=aligned, **config)
    return partial


def step(
    table: torch.Tensor,
    rows: torch.Tensor,
    hyper: torch.Tensor,
    norm: torch.Tensor | None,
    max_norm: float,
    aligned: bool,
    chunk: int,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Updates every parameter of the table. One launch.

    rows: `chunk_rows`. hyper: float64 [groups, 6]. norm: what `grad_norm` wrote, divided by grad_scale, or None for
    no clipping to max_norm. aligned: whether every address of the table is a multiple of 16. grad_scale, found_inf:
    float32 [1] or None, see `gpt2_fast.ops.adamw`.
    """
    tensors, config = (table, rows, hyper, norm), _block("update", table.device, chunk)
    scaling = (grad_scale, found_inf)
    launch(update_kernel, (rows.numel(),), *tensors, float(max_norm), *scaling, CHUNK=chunk, ALIGNED=aligned, **config)


def _block(name: str, device: torch.device, chunk: int) -> dict[str, int]:
    config = tuning.config("adamw", name, config_arch(device))
    if chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two, not {chunk}")
    return {**config, "BLOCK": min(config["BLOCK"], chunk)}


def aot_specs() -> list[AotSpec]:
    """Every configuration: aligned tables and others, with and without clipping."""
    specs = []
    for arch in ARCHS:
        for aligned in (True, False):
            specs += _specs(arch, aligned)
        types = {"partial_ptr": "*fp32", "norm_ptr": "*fp32", "chunks": "i32"}
        config = tuning.config("adamw", "total", arch)
        specs.append(
            make_spec(norm_total_kernel, "adamw norm_total", types, {}, config, (arch,), unaligned=("chunks",))
        )
    return specs


def _specs(arch: int, aligned: bool) -> list[AotSpec]:
    """The kernels that walk a table."""
    table, constexprs = {"table_ptr": "*i64", "chunk_rows_ptr": "*i32"}, {"CHUNK": CHUNK, "ALIGNED": aligned}
    label = "aligned" if aligned else "unaligned"
    specs, config = [], tuning.config("adamw", "update", arch)
    # Of a loss that is not scaled; of one with a scale of our own; of a GradScaler's, before and after its unscale_.
    both, found = ("grad_scale", "found_inf"), ("found_inf",)
    for clip, scaling in itertools.product((True, False), ((), ("grad_scale",), both, found)):
        if scaling == ("grad_scale",) and not clip:  # a norm says what is found
            continue
        pointers = ("norm",) * clip + scaling
        types = {**table, "hyper_ptr": "*fp64", "max_norm": "fp32", **{f"{name}_ptr": "*fp32" for name in pointers}}
        name = " ".join(("adamw update", label, *("clip",) * clip, *scaling))
        specs.append(make_spec(update_kernel, name, types, constexprs, config, (arch,)))
    types, config = {**table, "partial_ptr": "*fp32"}, tuning.config("adamw", "norm", arch)
    name = f"adamw norm_partial {label}"
    return [*specs, make_spec(norm_partial_kernel, name, types, constexprs, config, (arch,))]
