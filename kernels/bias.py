"""Sums over the rows of a matrix (a bias gradient, a LayerNorm weight gradient), two stages, no atomics.

Stage one belongs to the caller, or to `column_sum` here: each of P programs adds up its own rows in float32
and writes one row of a [P, C] buffer. Stage two, `reduce_partials`, adds those P rows and rounds the sums to the dtype
of the parameter, for which a kernel of its own would take longer than the sum. P depends on the shape alone and the
order of both sums is fixed, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .aot import ARCHS, TRITON_DTYPE, AotSpec, config_arch, forms_for, make_spec
from .interpreter import cast
from .launch import launch


@triton.jit
def reduce_partials_kernel(
    partial_ptr,  # float32 [K, P, C]
    out_ptr,  # [K, C]
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    k = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in tl.range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows[:, None] < P) & (cols[None, :] < C)
        total += tl.load(partial_ptr + (k * P + rows[:, None]) * C + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + k * C + cols, cast(tl.sum(total, axis=0), out_ptr.dtype.element_ty), mask=cols < C)


@triton.jit
def column_sum_kernel(
    x_ptr,  # [N, C]
    partial_ptr,  # float32 [P, C]
    N,
    C,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in tl.range(tl.program_id(1) * BLOCK_N, N, tl.num_programs(1) * BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        mask = (rows[:, None] < N) & (cols[None, :] < C)
        x = tl.load(x_ptr + rows[:, None].to(tl.int64) * C + cols[None, :], mask=mask, other=0.0)
        total += x.to(tl.float32)
    tl.store(partial_ptr + tl.program_id(1) * C + cols, tl.sum(total, axis=0), mask=cols < C)


def reduce_partials(partials: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """partials float32 [K, P, C] -> [K, C] in `dtype`, the sum over P in float32, rounded once."""
    kinds, rows, cols = partials.shape
    out = torch.empty((kinds, cols), dtype=dtype, device=partials.device)
    config = tuning.config("bias", "reduce_partials", config_arch(partials.device))
    grid = (triton.cdiv(cols, config["BLOCK_C"]), kinds)
    launch(reduce_partials_kernel, grid, partials, out, rows, cols, **config)
    return out


def column_sum(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """x [N, C] contiguous -> [C] in `dtype`, the sum over N in float32: the bias gradient of a linear layer."""
    rows, cols = x.shape
    config = dict(tuning.config("bias", "column_sum", config_arch(x.device)))
    programs = max(1, min(config.pop("programs"), triton.cdiv(rows, config["BLOCK_N"])))
    partials = torch.empty((1, programs, cols), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(cols, config["BLOCK_C"]), programs)
    launch(column_sum_kernel, grid, x, partials, rows, cols, **config)
    return reduce_partials(partials, dtype).squeeze(0)


def aot_specs() -> list[AotSpec]:
    """Every configuration of this file."""
    sizes = {"partial_ptr": "*fp32", "C": "i32"}
    specs = []
    for arch in ARCHS:
        config = tuning.config("bias", "reduce_partials", arch)
        for dtype in forms_for(arch, TRITON_DTYPE.values()):
            name, types = f"reduce_partials {dtype}", {**sizes, "out_ptr": f"*{dtype}", "P": "i32"}
            name = name.removesuffix(" fp32")
            specs.append(make_spec(reduce_partials_kernel, name, types, {}, config, (arch,)))
        config = tuning.config("bias", "column_sum", arch)
        for dtype in forms_for(arch, TRITON_DTYPE.values()):
            types = {**sizes, "x_ptr": f"*{dtype}", "N": "i32"}
            specs.append(make_spec(column_sum_kernel, f"column_sum {dtype}", types, {}, config, (arch,)))
    return specs
