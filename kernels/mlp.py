"""The first half of GPT-2's MLP: LayerNorm, matmul, bias and GELU (gelu.py), forward and backward.

    h = residual + dropout(x),    u = LayerNorm(h) @ weight + bias,    y = gelu(u)

Many rows: LayerNorm in one pass, the vendor's product with its bias, GELU in one pass; or, where the table says so, the
product that has both in its epilogue (linear_gelu.py). Few rows (decoding), where launches are what counts: the row
statistics, and a product that normalises the tiles of h as it loads them. For many rows that kernel is slower:
normalising in registers keeps the tiles from going to shared memory asynchronously (benchmarks/NOTES.md has the
measurement).

Saved for backward: h, u, mean, rstd, and of many rows the normalised ones. Backward is du = dy * gelu'(u) with the bias
gradient in the same pass, or in the epilogue of the product that dy comes of, two vendor products (few rows are
normalised again for one of them), and the LayerNorm backward that add_layernorm has.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from . import add_layernorm, linear_gelu, tuning
from .aot import ARCHS, INTERPRETER, TRITON_DTYPE, AotSpec, config_arch, forms_for, make_spec
from .bias import reduce_partials
from .gelu import gelu_derivative, gelu_gate
from .interpreter import cast, dot
from .launch import launch

OP = "mlp"
FEW_ROWS = 64  # up to so many (decoding) one kernel normalises, multiplies and takes GELU: n is never written
INTERPRETER_CONFIG = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
GROUP_M = 8


@triton.jit
def matmul_kernel(
    h_ptr,  # [N, C]
    mean_ptr,  # float32 [N]
    rstd_ptr,  # float32 [N]
    ln_weight_ptr,  # [C]
    ln_bias_ptr,  # [C]
    weight_ptr,  # [C, F]
    bias_ptr,  # [F]
    y_ptr,  # [N, F]
    u_ptr,  # [N, F]
    N,
    F,
    C: tl.constexpr,
    ERF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs go down GROUP_M tiles of rows before the next column of tiles: the group's rows stay in L2.
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_n = tl.cdiv(F, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    rows = (group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)

    in_rows = rows < N
    in_cols = cols < F
    mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
    h_rows = h_ptr + rows[:, None].to(tl.int64) * C
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, C, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        # Past C the weights and bias of the LayerNorm are 0, and so is the normalised tile.
        if C % BLOCK_K == 0:
            h = tl.load(h_rows + ks[None, :], mask=in_rows[:, None], other=0.0)
            ln_weight = tl.load(ln_weight_ptr + ks)
            ln_bias = tl.load(ln_bias_ptr + ks)
            b = tl.load(weight_ptr + ks[:, None].to(tl.int64) * F + cols[None, :], mask=in_cols[None, :], other=0.0)
        else:
            in_k = ks < C
            h = tl.load(h_rows + ks[None, :], mask=in_rows[:, None] & in_k[None, :], other=0.0)
            ln_weight = tl.load(ln_weight_ptr + ks, mask=in_k, other=0.0)
            ln_bias = tl.load(ln_bias_ptr + ks, mask=in_k, other=0.0)
            b_mask = in_k[:, None] & in_cols[None, :]
            b = tl.load(weight_ptr + ks[:, None].to(tl.int64) * F + cols[None, :], mask=b_mask, other=0.0)
        n = (h.to(tl.float32) - mean[:, None]) * rstd[:, None]
        n = n * ln_weight[None, :].to(tl.float32) + ln_bias[None, :].to(tl.float32)
        acc = dot(cast(n, b.dtype), b, acc)

    u = acc + tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None].to(tl.int64) * F + cols[None, :]
    mask = in_rows[:, None] & in_cols[None, :]
    tl.store(u_ptr + offsets, cast(u, u_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offsets, cast(u * gelu_gate(u, ERF), y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_forward_kernel(
    u_ptr,  # [numel]
    y_ptr,  # [numel]
    numel,
    ERF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, cast(u * gelu_gate(u, ERF), y_ptr.dtype.element_ty), mask=at < numel)


@triton.jit
def gelu_backward_kernel(
    dy_ptr,  # [N, F]
    u_ptr,  # [N, F]
    du_ptr,  # [N, F]
    partial_ptr,  # float32 [P, F]
    N,
    F,
    ERF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    dbias = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for start in tl.range(tl.program_id(1) * BLOCK_N, N, tl.num_programs(1) * BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        mask = (rows[:, None] < N) & (cols[None, :] < F)
        offsets = rows[:, None].to(tl.int64) * F + cols[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        du = dy * gelu_derivative(u, ERF)
        tl.store(du_ptr + offsets, cast(du, du_ptr.dtype.element_ty), mask=mask)
        dbias += du
    tl.store(partial_ptr + tl.program_id(1) * F + cols, tl.sum(dbias, axis=0), mask=cols < F)


def _config(arch: int, itemsize: int) -> dict[str, int]:
    return INTERPRETER_CONFIG if arch == INTERPRETER else tuning.config(OP, "matmul", arch, itemsize)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout_p: float,
    rng: torch.Tensor | None,
    site: int,
    erf: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual [N, C] (or None), weight [C, F], bias [F] -> y [N, F], n = LayerNorm(h) [N, C], h, u [N, F], mean,
    rstd float32 [N].

    The product is taken in `dtype`, which y, n and u have. n is None up to FEW_ROWS. Without a residual h is x and None
    stands for it. weight may be a transposed view.
    """
    if x.shape[0] > FEW_ROWS:
        n, h, mean, rstd = add_layernorm.forward(x, residual, ln_weight, ln_bias, eps, dropout_p, rng, site, dtype)
        weight, bias = weight.to(dtype), bias.to(dtype)
        if config := linear_gelu.config_for("forward", n, weight):
            u, y = linear_gelu.forward(n, weight, bias, erf, config)
        else:
            u = torch.addmm(bias, n, weight)
            y = gelu_forward(u, erf)
        return y, n, h, u, mean, rstd
    h, mean, rstd = add_layernorm.statistics(x, residual, eps, dropout_p, rng, site)
    y, u = _few_rows(x if h is None else h, mean, rstd, ln_weight, ln_bias, weight.to(dtype), bias, erf)
    return y, None, h, u, mean, rstd


def _few_rows(h, mean, rstd, ln_weight, ln_bias, weight, bias, erf) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, channels), features = h.shape, weight.shape[1]
    y = torch.empty((rows, features), dtype=weight.dtype, device=h.device)
    u = torch.empty_like(y)
    if rows:
        config = _config(config_arch(h.device), weight.element_size())
        tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(features, config["BLOCK_N"])
        launch(
            matmul_kernel,
            (tiles,),
            h,
            mean,
            rstd,
            ln_weight,
            ln_bias,
            weight.contiguous(),  # it reads [C, F] alone: nn.Linear's is copied
            bias,
            y,
            u,
            rows,
            features,
            C=channels,
            ERF=erf,
            GROUP_M=GROUP_M,
            **config,
        )
    return y, u


def gelu_forward(u: torch.Tensor, erf: bool) -> torch.Tensor:
    """gelu(u), u contiguous of any shape."""
    y = torch.empty_like(u)
    config = tuning.config(OP, "gelu_forward", config_arch(u.device))
    grid = (triton.cdiv(u.numel(), config["BLOCK"]),)
    launch(gelu_forward_kernel, grid, u, y, u.numel(), ERF=erf, **config)
    return y


def gelu_backward(
    dy: torch.Tensor, u: torch.Tensor, erf: bool, sums_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy, u [N, F] -> du [N, F] = dy * gelu'(u) in u's dtype, and its sum over the rows, [F] in sums_dtype."""
    rows, features = u.shape
    du = torch.empty_like(u)
    config = dict(tuning.config(OP, "gelu_backward", config_arch(u.device)))
    programs = max(1, min(config.pop("programs"), triton.cdiv(rows, config["BLOCK_N"])))
    partials = torch.empty((1, programs, features), dtype=torch.float32, device=u.device)
    grid = (triton.cdiv(features, config["BLOCK_F"]), programs)
    launch(gelu_backward_kernel, grid, dy, u, du, partials, rows, features, ERF=erf, **config)
    return du, reduce_partials(partials, sums_dtype).squeeze(0)


def product_gelu_backward(
    dm: torch.Tensor, weight: torch.Tensor, u: torch.Tensor, erf: bool, sums_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gelu_backward` of dy = dm @ weight^T, dm [N, O], c_proj's weight [F, O], which may be a transposed view."""
    if config := linear_gelu.config_for("backward", dm, weight, u):
        return linear_gelu.backward(dm, weight, u, erf, config, sums_dtype)
    return gelu_backward(torch.mm(dm, weight.t()), u, erf, sums_dtype)


def backward(
    du: torch.Tensor,
    dh: torch.Tensor | None,
    n: torch.Tensor | None,
    h: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    weight: torch.Tensor,
    dropout_p: float,
    rng: torch.Tensor | None,
    site: int,
    x_dtype: torch.dtype,
    has_residual: bool,
) -> tuple[torch.Tensor | None, ...]:
    """du [N, F], dh [N, C] or None -> dx or None, dresidual [N, C], dln_weight, dln_bias [C] in ln_weight's dtype,
    dweight [C, F] in weight's dtype.

    n: as `forward` returned it, or None: it is then made again. dx is None as in `add_layernorm.backward`.
    """
    if n is None:
        n = add_layernorm.normalize(h, ln_weight, ln_bias, mean, rstd, du.dtype)
    dweight = torch.empty_like(weight)  # weight may be a transposed view, and its gradient is then one too
    torch.mm(n.t(), du, out=dweight)
    dn = torch.mm(du, weight.to(du.dtype).t())
    dx, dresidual, dln_weight, dln_bias = add_layernorm.backward(
        dn, dh, h, ln_weight, mean, rstd, dropout_p, rng, site, x_dtype, has_residual, ln_weight.dtype
    )
    return dx, dresidual, dln_weight, dln_bias, dweight


def aot_specs() -> list[AotSpec]:
    """Every configuration, for each dtype and autocast's mix of bfloat16 with a float32 stream, for both GELUs."""
    pairs = [("fp32", "fp32", 4), ("bf16", "bf16", 2), ("fp16", "fp16", 2), ("bf16", "fp32", 2)]
    specs = []
    for arch, erf in itertools.product(ARCHS, (False, True)):
        own, dtypes = forms_for(arch, pairs), forms_for(arch, TRITON_DTYPE.values())
        specs += [_matmul_spec(arch, _config(arch, size), dtype, stream, erf) for dtype, stream, size in own]
        specs += [_gelu_forward_spec(arch, dtype, erf) for dtype in dtypes]
        specs += [_gelu_backward_spec(arch, dtype, erf) for dtype in dtypes]
    return specs


def _gelu_forward_spec(arch: int, dtype: str, erf: bool) -> AotSpec:
    types, config = (
        {"u_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "numel": "i32"},
        tuning.config(OP, "gelu_forward", arch),
    )
    return make_spec(gelu_forward_kernel, f"gelu_forward {dtype}{' erf' * erf}", types, {"ERF": erf}, config, (arch,))


def _gelu_backward_spec(arch: int, dtype: str, erf: bool) -> AotSpec:
    types = {
        **dict.fromkeys(("dy_ptr", "u_ptr", "du_ptr"), f"*{dtype}"),
        "partial_ptr": "*fp32",
        "N": "i32",
        "F": "i32",
    }
    name, config = f"gelu_backward {dtype}{' erf' * erf}", tuning.config(OP, "gelu_backward", arch)
    return make_spec(gelu_backward_kernel, name, types, {"ERF": erf}, config, (arch,), unaligned=("N",))


def _matmul_spec(arch: int, config: dict[str, int], dtype: str, stream: str, erf: bool) -> AotSpec:
    types = {
        **dict.fromkeys(("h_ptr", "ln_weight_ptr", "ln_bias_ptr", "bias_ptr"), f"*{stream}"),
        **dict.fromkeys(("weight_ptr", "y_ptr", "u_ptr"), f"*{dtype}"),
        **dict.fromkeys(("mean_ptr", "rstd_ptr"), "*fp32"),
        **dict.fromkeys(("N", "F"), "i32"),
    }
    name = f"mlp few rows {dtype} h={stream}{' erf' * erf}"
    constexprs = {"C": 768, "ERF": erf, "GROUP_M": GROUP_M}
    return make_spec(matmul_kernel, name, types, constexprs, config, (arch,), unaligned=("N",))
