"""Causal flash attention on packed qkv [B, T, 3, H, D], forward and backward (Dao, FlashAttention-2, 2023).

    S = scale Q K^T     P = softmax(S over visible keys)     O = dropout(P) V     lse = log sum exp S

Query i sees key j iff j <= i and, with segments, segments[j] is i's document. A segment value >= 0 is a
document; a value < 0 is padding, which as a query belongs to document ~value and as a key is seen by nobody.
A query that sees nothing has O = 0, lse = -inf and no gradient.

Saved for backward: qkv, O and lse [B, H, T] (float32, natural log); P is recomputed, and its dropout mask is
regenerated from coordinates (z = b H + h, row = i, column = j).

    dV = dropout(P)^T dO    dP = dropout'(dO V^T)    delta = rowsum(dO * O)
    dS = P * (dP - delta)   dQ = scale dS K          dK = scale dS^T Q

Differs from the usual way: heads are read in place by strides, so nothing is transposed or copied and dqkv is
written packed; delta is a by-product of the dQ kernel, not a pass of its own; that kernel leaves it and lse padded to
whole tiles, which dK, dV's loop loads without masks; dQ and dK, dV are two kernels that each own what they write, so
there are no atomics and the same inputs give the same bits.

Each kernel takes the tiles on the diagonal first, and is told that there are some (`tl.assume`). Behind a loop that
might not have run, accumulators meet others before they are complete, and ptxas then waits for each tensor-core product
(its warning C7515, on sm_90).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from .aot import ARCHS, AotSpec, config_arch, forms_for, make_spec
from .attention_backward import backward_dkdv_kernel, backward_dq_kernel
from .attention_tiles import (
    LN2,
    LOG2E,
    block_d,
    check_batch,
    config,
    document,
    hide,
    load_segments,
    load_tile,
    place,
    store_tile,
)
from .interpreter import cast, dot
from .launch import launch
from .philox import Dropout, arguments, keep_tile, load_key


@triton.jit(do_not_specialize=["threshold", "site", "T", "H"])
def forward_kernel(
    qkv_ptr,  # [B, T, 3, H, D]
    segments_ptr,  # [B, T] int32 or None
    rng_ptr,  # [1] int64 or None
    out_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] f32
    scale,  # f32, > 0
    kept_scale,  # f32, 1 / (1 - p)
    threshold,  # int32 bits
    site,  # int32
    T,
    H,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    # The last query blocks have the most keys: they start first, and the short ones fill the end.
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    b, h, z = place(H)
    row_stride = 3 * H * HEAD_DIM
    q_ptr = qkv_ptr + b * T * row_stride + h * HEAD_DIM
    k_ptr = q_ptr + H * HEAD_DIM
    v_ptr = k_ptr + H * HEAD_DIM
    if SEGMENTS:
        segments_ptr += b * T
    rows = start_m + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, start_m, row_stride, T, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # unnormalised
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running maximum of the scores, in units of log 2
    l = tl.zeros([BLOCK_M], tl.float32)  # running sum
    diagonal = start_m // BLOCK_N * BLOCK_N
    end = tl.minimum(start_m + BLOCK_M, T)
    tl.assume(end > diagonal)
    scale2 = scale * LOG2E
    for crossing in tl.static_range(1, -1, -1):  # the keys on the diagonal, then those that every query sees
        doc = document(segments_ptr, rows, T, SEGMENTS)
        if DROPOUT:
            key_lo, key_hi = load_key(rng_ptr)
        for start in range(diagonal if crossing else 0, end if crossing else diagonal, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            k = load_tile(k_ptr, start, row_stride, T, BLOCK_N, HEAD_DIM, BLOCK_D, crossing == 1)
            s = dot(q, tl.trans(k))
            seg = load_segments(segments_ptr, cols, T, SEGMENTS)
            s = hide(s, rows[:, None], cols[None, :], doc[:, None], seg[None, :], crossing == 1, SEGMENTS)
            m_new = tl.maximum(m, tl.max(s, 1) * scale2)
            shift = m_new
            if SEGMENTS:
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.math.exp2(s * scale2 - shift[:, None])
            alpha = tl.math.exp2(m - shift)
            l = l * alpha + tl.sum(p, 1)
            m = m_new
            if DROPOUT:
                keep = keep_tile(key_lo, key_hi, threshold, site, z, start_m, start, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            v = load_tile(v_ptr, start, row_stride, T, BLOCK_N, HEAD_DIM, BLOCK_D, crossing == 1)
            acc = dot(cast(p, v.dtype), v, acc * alpha[:, None])
    tl.store(lse_ptr + (b * H + h) * T + rows, (m + tl.math.log2(l)) * LN2, mask=rows < T)
    if SEGMENTS:
        l = tl.where(l == 0.0, 1.0, l)
    acc *= (kept_scale / l)[:, None]
    store_tile(out_ptr + (b * T * H + h) * HEAD_DIM, acc, start_m, H * HEAD_DIM, T, HEAD_DIM)


def forward(
    qkv: torch.Tensor,
    scale: float,
    segments: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng: torch.Tensor | None = None,
    site: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of qkv [B, T, 3, H, D] (contiguous; float32, bfloat16 or float16).

    scale > 0 multiplies the scores. segments: int32 [B, T]. rng: int64 [1], read when dropout_p > 0.
    Returns out [B, T, H, D] in qkv's dtype and lse [B, H, T] float32, natural log.
    Raises ValueError for a head size outside 16..128, a scale that is not positive, dropout without rng, or more than
    65535 sequences.
    """
    common = _common(qkv, scale, segments, Dropout(dropout_p, rng, site))
    B, T, _, H, D = qkv.shape
    out = torch.empty((B, T, H, D), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=qkv.device)
    _launch("forward", common, out_ptr=out, lse_ptr=lse)
    return out, lse


def backward(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    segments: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng: torch.Tensor | None = None,
    site: int = 0,
) -> torch.Tensor:
    """Gradient dqkv [B, T, 3, H, D] from dout [B, T, H, D] (contiguous, qkv's dtype) and what forward returned.

    The other arguments are forward's, unchanged. Every element of dqkv is written, each by one program.
    """
    common = _common(qkv, scale, segments, Dropout(dropout_p, rng, site))
    dqkv = torch.empty_like(qkv)
    B, H, T = lse.shape
    tiles = [_tile(name, common)["BLOCK_M"] for name in ("backward_dq", "backward_dkdv")]
    padded = triton.cdiv(T, max(tiles)) * max(tiles)
    stats = torch.empty((B, H, 2, padded), dtype=torch.float32, device=qkv.device)
    gradients = {"dout_ptr": dout, "stats_ptr": stats, "R": padded, "dqkv_ptr": dqkv}
    _launch("backward_dq", common, out_ptr=out, lse_ptr=lse, **gradients)
    _launch("backward_dkdv", common, **gradients)
    return dqkv


def _common(qkv: torch.Tensor, scale: float, segments: torch.Tensor | None, dropout: Dropout) -> dict[str, Any]:
    """The arguments that all three kernels take, checked."""
    B, T, _, H, D = qkv.shape
    check_batch(B)
    shapes = {"T": T, "H": H, "HEAD_DIM": D, "BLOCK_D": block_d(D), "SEGMENTS": segments is not None}
    if not scale > 0.0:
        raise ValueError(f"scale must be positive, got {scale}")
    return {"qkv_ptr": qkv, "segments_ptr": segments, "scale": scale, **shapes, **arguments(dropout)}


def _tile(name: str, common: dict[str, Any]) -> dict[str, int]:
    qkv = common["qkv_ptr"]
    return config(name, config_arch(qkv.device), qkv.element_size(), common["HEAD_DIM"], common["DROPOUT"])


def _launch(name: str, common: dict[str, Any], **own: torch.Tensor | int) -> None:
    kernel, owned = KERNELS[name]
    B, T, _, H, _ = common["qkv_ptr"].shape
    tile = _tile(name, common)
    grid = (triton.cdiv(T, tile["BLOCK_M" if owned == "queries" else "BLOCK_N"]), H, B)
    launch(kernel, grid, **common, **own, **tile)


# What a program of each kernel owns: a block of queries or of keys.
KERNELS = {
    "forward": (forward_kernel, "queries"),
    "backward_dq": (backward_dq_kernel, "queries"),
    "backward_dkdv": (backward_dkdv_kernel, "keys"),
}


def aot_specs() -> list[AotSpec]:
    """Every shipped configuration with segments, its larger form; at head size 64 also without, and float16;
    beside head size 128 the padded 80."""
    types = {"rng_ptr": "*i64", "segments_ptr": "*i32", "lse_ptr": "*fp32", "stats_ptr": "*fp32", "R": "i32"}
    types |= {"scale": "fp32", "kept_scale": "fp32", "threshold": "i32", "site": "i32", "T": "i32", "H": "i32"}
    both = (True, True)
    forms = [(64, "bf16", 2, segments, dropout) for segments in (False, True) for dropout in (False, True)]
    forms += [(D, "bf16", 2, True, dropout) for D in (32, 80, 128) for dropout in (False, True)]
    forms += [(64, "fp16", 2, *both), (64, "fp32", 4, False, False)]
    forms += [(D, "fp32", 4, *both) for D in (32, 64, 80, 128)]
    specs = []
    of_archs = [(arch, *form) for arch in ARCHS for form in forms_for(arch, forms)]
    for (name, (kernel, _)), form in itertools.product(KERNELS.items(), of_archs):
        arch, D, dtype, itemsize, segments, dropout = form
        constexprs = {"HEAD_DIM": D, "BLOCK_D": block_d(D), "SEGMENTS": segments, "DROPOUT": dropout}
        absent = ("segments_ptr",) * (not segments) + ("rng_ptr",) * (not dropout)
        given = [a for a in kernel.arg_names if (a in types or a.endswith("_ptr")) and a not in absent]
        signature = {a: types.get(a, f"*{dtype}") for a in given}
        label = f"attention.{name} {dtype} D={D}{' segments' * segments}{' dropout' * dropout}"
        tile, loose = config(name, arch, itemsize, D, dropout), ("threshold", "site", "T", "H")
        specs.append(make_spec(kernel, label, signature, constexprs, tile, (arch,), unaligned=loose))
    return specs
