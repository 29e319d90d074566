"""Backward of causal flash attention: one kernel owns dQ, one owns dK and dV. The equations are in attention.py."""

import triton
import triton.language as tl

from .attention_tiles import LOG2E, document, hide, load_lse2, load_segments, load_tile, store_tile
from .interpreter import cast, dot
from .philox import keep_tile, keep_tile_transposed, load_key


@triton.jit
def _dq_tiles(
    dq,  # [BM, BD] f32
    q,  # [BM, BD]
    do,  # [BM, BD]
    lse2,  # [BM], lse * log2(e), +inf where nothing is seen
    delta,  # [BM]
    k_ptr,  # this head's keys, likewise v_ptr
    v_ptr,
    segments_ptr,  # this sequence's
    rng_ptr,
    start_m,  # first query
    lo,  # first key
    hi,  # end of keys
    scale2,  # scale * log2(e)
    kept_scale,
    threshold,
    site,
    z,
    T,
    row_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    rows = start_m + tl.arange(0, BLOCK_M)
    doc = document(segments_ptr, rows, T, SEGMENTS)
    if DROPOUT:
        key_lo, key_hi = load_key(rng_ptr)
    for start in range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, start, row_stride, T, BLOCK_N, HEAD_DIM, BLOCK_D, DIAGONAL)
        v = load_tile(v_ptr, start, row_stride, T, BLOCK_N, HEAD_DIM, BLOCK_D, DIAGONAL)
        seg = load_segments(segments_ptr, cols, T, SEGMENTS)
        s = dot(q, tl.trans(k))
        s = hide(s, rows[:, None], cols[None, :], doc[:, None], seg[None, :], DIAGONAL, SEGMENTS)
        p = tl.math.exp2(s * scale2 - lse2[:, None])
        dp = dot(do, tl.trans(v))
        if DROPOUT:
            keep = keep_tile(key_lo, key_hi, threshold, site, z, start_m, start, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = dot(cast(ds, k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["threshold", "site", "T", "H"])
def backward_dq_kernel(
    qkv_ptr,  # [B, T, 3, H, D]
    segments_ptr,  # [B, T] int32 or None
    rng_ptr,  # [1] int64 or None
    out_ptr,  # [B, T, H, D]
    dout_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] f32
    delta_ptr,  # [B, H, T] f32, written
    dqkv_ptr,  # [B, T, 3, H, D], part 0 written
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
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    z = tl.program_id(2) * H + h
    row_stride = 3 * H * HEAD_DIM
    head = b * T * row_stride + h * HEAD_DIM
    k_ptr = qkv_ptr + head + H * HEAD_DIM
    v_ptr = k_ptr + H * HEAD_DIM
    head_out = (b * T * H + h) * HEAD_DIM
    if SEGMENTS:
        segments_ptr += b * T
    rows = start + tl.arange(0, BLOCK_M)
    do = load_tile(dout_ptr + head_out, start, H * HEAD_DIM, T, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    o = load_tile(out_ptr + head_out, start, H * HEAD_DIM, T, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * T + rows, delta, mask=rows < T)
    lse2 = load_lse2(lse_ptr + (b * H + h) * T, rows, T, SEGMENTS)
    q = load_tile(qkv_ptr + head, start, row_stride, T, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    diagonal = start // BLOCK_N * BLOCK_N
    end = tl.minimum(start + BLOCK_M, T)
    for crossing in tl.static_range(2):
        dq = _dq_tiles(
            dq, q, do, lse2, delta, k_ptr, v_ptr, segments_ptr, rng_ptr, start, diagonal if crossing else 0,
            end if crossing else diagonal, scale * LOG2E, kept_scale, threshold, site, z, T, row_stride, HEAD_DIM,
            BLOCK_D, BLOCK_M, BLOCK_N, crossing == 1, SEGMENTS, DROPOUT,
        )  # fmt: skip
    store_tile(dqkv_ptr + head, dq * scale, start, row_stride, T, HEAD_DIM)


@triton.jit
def _dkdv_tiles(
    dk,  # [BN, BD] f32
    dv,  # [BN, BD] f32
    k,  # [BN, BD]
    v,  # [BN, BD]
    q_ptr,  # this head's queries, likewise the next three
    dout_ptr,
    lse_ptr,
    delta_ptr,
    segments_ptr,  # this sequence's
    rng_ptr,
    start_n,  # first key
    lo,  # first query
    hi,  # end of queries
    scale2,  # scale * log2(e)
    kept_scale,
    threshold,
    site,
    z,
    T,
    H,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    cols = start_n + tl.arange(0, BLOCK_N)
    seg = load_segments(segments_ptr, cols, T, SEGMENTS)
    if DROPOUT:
        key_lo, key_hi = load_key(rng_ptr)
    for start in range(lo, hi, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr, start, 3 * H * HEAD_DIM, T, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        do = load_tile(dout_ptr, start, H * HEAD_DIM, T, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        lse2 = load_lse2(lse_ptr, rows, T, SEGMENTS)
        delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)
        doc = document(segments_ptr, rows, T, SEGMENTS)
        s = dot(k, tl.trans(q))
        s = hide(s, rows[None, :], cols[:, None], doc[None, :], seg[:, None], DIAGONAL, SEGMENTS)
        p = tl.math.exp2(s * scale2 - lse2[None, :])
        dp = dot(v, tl.trans(do))
        kept = p
        if DROPOUT:
            keep = keep_tile_transposed(key_lo, key_hi, threshold, site, z, start, start_n, BLOCK_M, BLOCK_N)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        dv = dot(cast(kept, do.dtype), do, dv)
        ds = p * (dp - delta[None, :])
        dk = dot(cast(ds, q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["threshold", "site", "T", "H"])
def backward_dkdv_kernel(
    qkv_ptr,  # [B, T, 3, H, D]
    segments_ptr,  # [B, T] int32 or None
    rng_ptr,  # [1] int64 or None
    dout_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] f32
    delta_ptr,  # [B, H, T] f32, from the dQ kernel
    dqkv_ptr,  # [B, T, 3, H, D], parts 1 and 2 written
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
    # The first key blocks are seen by the most queries, and start first.
    start = tl.program_id(0) * BLOCK_N
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    z = tl.program_id(2) * H + h
    row_stride = 3 * H * HEAD_DIM
    q_head = b * T * row_stride + h * HEAD_DIM
    k_head = q_head + H * HEAD_DIM
    v_head = k_head + H * HEAD_DIM
    dout_ptr += (b * T * H + h) * HEAD_DIM
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T
    if SEGMENTS:
        segments_ptr += b * T
    k = load_tile(qkv_ptr + k_head, start, row_stride, T, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_tile(qkv_ptr + v_head, start, row_stride, T, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = start // BLOCK_M * BLOCK_M
    below = tl.minimum(tl.cdiv(start + BLOCK_N, BLOCK_M) * BLOCK_M, T)
    for crossing in tl.static_range(1, -1, -1):
        dk, dv = _dkdv_tiles(
            dk, dv, k, v, qkv_ptr + q_head, dout_ptr, lse_ptr, delta_ptr, segments_ptr, rng_ptr, start,
            first if crossing else below, below if crossing else T, scale * LOG2E, kept_scale, threshold, site, z,
            T, H, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, crossing == 1, SEGMENTS, DROPOUT,
        )  # fmt: skip
    store_tile(dqkv_ptr + k_head, dk * scale, start, row_stride, T, HEAD_DIM)
    store_tile(dqkv_ptr + v_head, dv * kept_scale, start, row_stride, T, HEAD_DIM)
