"""Residual add, dropout and LayerNorm in one pass over the rows, forward and backward.

    h = residual + dropout(x)            (h is x where there is no residual)
    y = (h - mean) * rstd * weight + bias,    rstd = 1 / sqrt(var + eps)

Saved for backward: h as stored, mean and rstd in float32; the dropout mask is recomputed. With
n = (h - mean) * rstd and g = dy * weight the gradient of a row is

    dresidual = (g - mean(g) - n * mean(g * n)) * rstd + dh        dx = dropout'(dresidual)

and dweight = sum(dy * n), dbias = sum(dy) over the rows: each of a fixed number of programs walks its own
rows and keeps its share in registers, `bias.reduce_partials` adds the shares. Statistics are taken of h as it
was rounded for storage, because that is the h which backward reads.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from . import tuning
from .aot import ARCHS, AotSpec, config_arch, forms_for, make_spec
from .bias import reduce_partials
from .interpreter import cast
from .launch import launch
from .philox import Dropout, arguments, keep_rows, load_key

WIDEST = 16384  # channels of a row that these kernels hold
PARTIALS = 512  # programs of backward at most, each with a share of dweight and dbias


@triton.jit(do_not_specialize=["threshold", "site"])
def forward_kernel(
    x_ptr,  # [N, C]
    residual_ptr,  # [N, C] or None
    weight_ptr,  # [C] or None: statistics only
    bias_ptr,  # [C] or None
    y_ptr,  # [N, C] or None
    h_ptr,  # [N, C] or None
    mean_ptr,  # float32 [N]
    rstd_ptr,  # float32 [N]
    rng_ptr,  # int64 [1] or None
    N,
    eps,
    threshold,
    kept_scale,
    site,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    mask = (rows[:, None] < N) & (cols[None, :] < C)
    offsets = rows[:, None].to(tl.int64) * C + cols[None, :]
    h = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        if DROPOUT:
            key_lo, key_hi = load_key(rng_ptr)
            keep = keep_rows(key_lo, key_hi, threshold, site, rows, BLOCK_C)
            h = tl.where(keep, h * kept_scale, 0.0)
        h += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        stored = cast(h, h_ptr.dtype.element_ty)
        tl.store(h_ptr + offsets, stored, mask=mask)
        h = stored.to(tl.float32)

    mean = tl.sum(h, axis=1) / C
    centred = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    tl.store(mean_ptr + rows, mean, mask=rows < N)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    if y_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(y_ptr + offsets, cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold", "site"])
def backward_kernel(
    dy_ptr,  # [N, C]
    dh_ptr,  # [N, C] or None
    h_ptr,  # [N, C]
    weight_ptr,  # [C]
    mean_ptr,  # float32 [N]
    rstd_ptr,  # float32 [N]
    dx_ptr,  # [N, C] or None
    dresidual_ptr,  # [N, C]
    partial_ptr,  # float32 [2, P, C]: dweight, dbias
    rng_ptr,  # int64 [1] or None
    N,
    threshold,
    kept_scale,
    site,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,  # tiles under way
    DROPOUT: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_C)
    in_row = cols < C
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    if DROPOUT:
        key_lo, key_hi = load_key(rng_ptr)
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < N) & in_row[None, :]
        offsets = rows[:, None].to(tl.int64) * C + cols[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < N, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
        n = tl.where(mask, (h - mean[:, None]) * rstd[:, None], 0.0)
        dweight += dy * n
        dbias += dy
        g = dy * weight[None, :]
        along_n = tl.sum(g * n, axis=1) / C
        along_1 = tl.sum(g, axis=1) / C
        dresidual = (g - along_1[:, None] - n * along_n[:, None]) * rstd[:, None]
        if dh_ptr is not None:
            dresidual += tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dresidual_ptr + offsets, cast(dresidual, dresidual_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            dx = dresidual
            if DROPOUT:
                keep = keep_rows(key_lo, key_hi, threshold, site, rows, BLOCK_C)
                dx = tl.where(keep, dx * kept_scale, 0.0)
            tl.store(dx_ptr + offsets, cast(dx, dx_ptr.dtype.element_ty), mask=mask)

    share = partial_ptr + tl.program_id(0) * C + cols
    tl.store(share, tl.sum(dweight, axis=0), mask=in_row)
    tl.store(share + tl.num_programs(0) * C, tl.sum(dbias, axis=0), mask=in_row)


@triton.jit
def normalize_kernel(
    h_ptr,  # [N, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    mean_ptr,  # float32 [N]
    rstd_ptr,  # float32 [N]
    y_ptr,  # [N, C]
    N,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    mask = (rows[:, None] < N) & (cols[None, :] < C)
    offsets = rows[:, None].to(tl.int64) * C + cols[None, :]
    h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + rows, mask=rows < N, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    y = (h - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + offsets, cast(y, y_ptr.dtype.element_ty), mask=mask)


def _tile(
    channels: int, arch: int, itemsize: int, dropout: bool = False, direction: str = "forward"
) -> tuple[dict[str, int], int]:
    """(constexprs and options of a launch, rows a program) for rows of `channels`, h of `itemsize` bytes an element."""
    block = max(16, triton.next_power_of_2(channels))
    if block > WIDEST:
        raise ValueError(f"n_embd {channels} is above {WIDEST}, the widest row these kernels hold")
    config = tuning.config("add_layernorm", direction, arch, itemsize, width=block, dropout=dropout)
    return {"C": channels, "BLOCK_C": block, **config}, config["ROWS"]


def _rows_forward(x, residual, weight, bias, y, eps, dropout):
    rows, channels = x.shape
    h = None if residual is None else torch.empty_like(residual)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if rows:
        drop = arguments(Dropout() if residual is None else dropout)
        itemsize = (x if residual is None else residual).element_size()
        tile, step = _tile(channels, config_arch(x.device), itemsize, drop["DROPOUT"])
        tensors = (x, residual, weight, bias, y, h, mean, rstd)
        launch(forward_kernel, (triton.cdiv(rows, step),), *tensors, N=rows, eps=eps, **drop, **tile)
    return h, mean, rstd


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    rng: torch.Tensor | None,
    site: int,
    y_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """x, residual [N, C] (or None) -> y [N, C] in y_dtype, h in residual's dtype, mean, rstd float32 [N].

    Without a residual h is x, nothing is dropped and None stands for h.
    """
    y = torch.empty(x.shape, dtype=y_dtype, device=x.device)
    return y, *_rows_forward(x, residual, weight, bias, y, eps, Dropout(dropout_p, rng, site))


def statistics(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    rng: torch.Tensor | None,
    site: int,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """`forward` without y: h (None without a residual), mean and rstd."""
    return _rows_forward(x, residual, None, None, None, eps, Dropout(dropout_p, rng, site))


def normalize(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """LayerNorm(h) [N, C] in `dtype` from the statistics that forward saved."""
    rows, channels = h.shape
    y = torch.empty(h.shape, dtype=dtype, device=h.device)
    if rows:
        tile, step = _tile(channels, config_arch(h.device), h.element_size())
        launch(normalize_kernel, (triton.cdiv(rows, step),), h, weight, bias, mean, rstd, y, N=rows, **tile)
    return y


def backward(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    rng: torch.Tensor | None,
    site: int,
    x_dtype: torch.dtype,
    has_residual: bool,
    sums_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy, h [N, C], dh [N, C] or None -> dx in x_dtype, dresidual in h's dtype, dweight, dbias [C] in sums_dtype.

    dx is None where it would be dresidual again (no dropout, one dtype) and where there is no residual: x's
    gradient is then dresidual.
    """
    rows, channels = h.shape
    own_dx = has_residual and (dropout_p > 0 or x_dtype != h.dtype)
    dx = torch.empty(h.shape, dtype=x_dtype, device=h.device) if own_dx else None
    dresidual = torch.empty_like(h)
    drop = arguments(Dropout(dropout_p, rng, site) if own_dx else Dropout())
    tile, step = _tile(channels, config_arch(h.device), h.element_size(), drop["DROPOUT"], "backward")
    programs = min(PARTIALS, max(1, triton.cdiv(rows, step)))
    partials = torch.empty((2, programs, channels), dtype=torch.float32, device=h.device)
    tensors = (dy, dh, h, weight, mean, rstd, dx, dresidual, partials)
    launch(backward_kernel, (programs,), *tensors, N=rows, **drop, **tile)
    dweight, dbias = reduce_partials(partials, sums_dtype)
    return dx, dresidual, dweight, dbias


def aot_specs() -> list[AotSpec]:
    """Every tile shape of GPT-2's widths (768 and 1024 share one, 1280 and 1600 another), every dtype and
    autocast's mix of a bfloat16 row with a float32 stream, with and without dropout and residual."""
    pairs, specs = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32")), []
    for channels, arch in itertools.product((768, 1600), ARCHS):
        for row, stream in forms_for(arch, pairs):
            for dropout in (False, True):
                specs += _specs(channels, arch, row, stream, dropout)
            specs += _specs_alone(channels, arch, row, stream)
    return specs


def _specs(channels: int, arch: int, row: str, stream: str, dropout: bool) -> list[AotSpec]:
    """The kernels of a sublayer's end: x and y in `row`, the residual stream and parameters in `stream`."""
    drop = {"threshold": "i32", "kept_scale": "fp32", "site": "i32", **({"rng_ptr": "*i64"} if dropout else {})}
    saved = {"h_ptr": f"*{stream}", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "N": "i32"}
    affine = {"weight_ptr": f"*{stream}", "bias_ptr": f"*{stream}", "y_ptr": f"*{row}"}
    statistics_ = {"x_ptr": f"*{row}", "residual_ptr": f"*{stream}", **saved, "eps": "fp32", **drop}
    grads = {"dy_ptr": f"*{row}", "dh_ptr": f"*{stream}", "weight_ptr": f"*{stream}", **saved, **drop}
    grads |= {"dresidual_ptr": f"*{stream}", "partial_ptr": "*fp32"}
    if dropout or row != stream:
        grads["dx_ptr"] = f"*{row}"
    label = f"C={channels} {row} h={stream}{' dropout' if dropout else ''}"
    return [
        _spec(forward_kernel, f"forward {label}", {**statistics_, **affine}, channels, arch, dropout),
        _spec(forward_kernel, f"statistics {label}", statistics_, channels, arch, dropout),
        _spec(backward_kernel, f"backward {label}", grads, channels, arch, dropout),
    ]


def _specs_alone(channels: int, arch: int, row: str, stream: str) -> list[AotSpec]:
    """The kernels where there is no residual: the first LayerNorm of the model."""
    drop = {"threshold": "i32", "kept_scale": "fp32", "site": "i32"}
    saved = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "N": "i32"}
    affine = {"weight_ptr": f"*{stream}", "bias_ptr": f"*{stream}", "y_ptr": f"*{row}"}
    x = {"x_ptr": f"*{stream}", **saved, "eps": "fp32", **drop}
    grads = {"dy_ptr": f"*{row}", "weight_ptr": f"*{stream}", "h_ptr": f"*{stream}", **saved, **drop}
    grads |= {"dresidual_ptr": f"*{stream}", "partial_ptr": "*fp32"}
    label = f"C={channels} {row} h={stream} no residual"
    return [
        _spec(forward_kernel, f"forward {label}", {**x, **affine}, channels, arch, False),
        _spec(forward_kernel, f"statistics {label}", x, channels, arch, False),
        _spec(backward_kernel, f"backward {label}", grads, channels, arch, False),
        _spec(normalize_kernel, f"normalize {label}", {"h_ptr": f"*{stream}", **saved, **affine}, channels, arch, None),
    ]


def _spec(kernel, name: str, types: dict[str, str], channels: int, arch: int, dropout: bool | None) -> AotSpec:
    stream = types["x_ptr" if "h_ptr" not in types else "h_ptr"]
    direction = "backward" if kernel is backward_kernel else "forward"
    tile, _ = _tile(channels, arch, 4 if stream == "*fp32" else 2, bool(dropout), direction)
    constexprs, loose = {} if dropout is None else {"DROPOUT": dropout}, ("N", "threshold", "site")
    return make_spec(kernel, f"add_layernorm {name}", types, constexprs, tile, (arch,), unaligned=loose)
