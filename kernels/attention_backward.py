"""Backward of causal flash attention: one kernel owns dQ, one owns dK and dV. The equations are in attention.py."""

import triton
import triton.language as tl

from .attention_tiles import LOG2E, document, hide, load_lse2, load_segments, load_tile, place, store_tile
from .interpreter import cast, dot
from .philox import keep_tile, keep_tile_transposed, load_key


@triton.jit(do_not_specialize=["threshold", "site", "T", "H"])
def backward_dq_kernel(
    qkv_ptr,  # [B, T, 3, H, D]
    segments_ptr,  # [B, T] int32 or None
    rng_ptr,  # [1] int64 or None
    out_ptr,  # [B, T, H, D]
    dout_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] f32
    stats_ptr,  # [B, H, 2, R] f32, written: lse2 and delta, with which rows beyond T add nothing
    dqkv_ptr,  # [B, T, 3, H, D], part 0 written
    scale,  # f32, > 0
    kept_scale,  # f32, 1 / (1 - p)
    threshold,  # int32 bits
    site,  # int32
    T,
    H,
    R,  # T rounded up to a multiple of both kernels' BLOCK_M
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    b, h, z = place(H)
    row_stride = 3 * H * HEAD_DIM
    head = b * T * row_stride + h * HEAD_DIM
    k_ptr = qkv_ptr + head + H * HEAD_DIM
    v_ptr = k_ptr + H * HEAD_DIM
    head_out = (b * T * H + h) * HEAD_DIM
    if SEGMENTS:
        segments_ptr += b * T
    rows = start_m + tl.arange(0, BLOCK_M)
    do = load_tile(dout_ptr + head_out, start_m, H * HEAD_DIM, T, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    o = load_tile(out_ptr + head_out, start_m, H * HEAD_DIM, T, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse2 = load_lse2(lse_ptr + (b * H + h) * T, rows, T, SEGMENTS)
    lse2_ptr = stats_ptr + (b * H + h) * 2 * R
    delta_ptr = lse2_ptr + R
    tl.store(lse2_ptr + rows, lse2)
    tl.store(delta_ptr + rows, delta)
    if start_m + BLOCK_M >= T:  # the last tile: the rows that it leaves of R
        for start in range(BLOCK_M, R - start_m, BLOCK_M):
            tl.store(lse2_ptr + start + rows, tl.full([BLOCK_M], float("inf"), tl.float32))
            tl.store(delta_ptr + start + rows, tl.zeros([BLOCK_M], tl.float32))
    q = load_tile(qkv_ptr + head, start_m, row_stride, T, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
            v = load_tile(v_ptr, start, row_stride, T, BLOCK_N, HEAD_DIM, BLOCK_D, crossing == 1)
            seg = load_segments(segments_ptr, cols, T, SEGMENTS)
            s = dot(q, tl.trans(k))
            s = hide(s, rows[:, None], cols[None, :], doc[:, None], seg[None, :], crossing == 1, SEGMENTS)
            p = tl.math.exp2(s * scale2 - lse2[:, None])
            dp = dot(do, tl.trans(v))
            if DROPOUT:
                keep = keep_tile(key_lo, key_hi, threshold, site, z, start_m, start, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * kept_scale, 0.0)
            ds = p * (dp - delta[:, None])
            dq = dot(cast(ds, k.dtype), k, dq)
    store_tile(dqkv_ptr + head, dq * scale, start_m, row_stride, T, HEAD_DIM)


@triton.jit(do_not_specialize=["threshold", "site", "T", "H"])
def backward_dkdv_kernel(
    qkv_ptr,  # [B, T, 3, H, D]
    segments_ptr,  # [B, T] int32 or None
    rng_ptr,  # [1] int64 or None
    dout_ptr,  # [B, T, H, D]
    stats_ptr,  # [B, H, 2, R] f32, from the dQ kernel: lse2 and delta
    dqkv_ptr,  # [B, T, 3, H, D], parts 1 and 2 written
    scale,  # f32, > 0
    kept_scale,  # f32, 1 / (1 - p)
    threshold,  # int32 bits
    site,  # int32
    T,
    H,
    R,  # T rounded up to a multiple of both kernels' BLOCK_M
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    # The first key blocks are seen by the most queries, and start first.
    start_n = tl.program_id(0) * BLOCK_N
    b, h, z = place(H)
    row_stride = 3 * H * HEAD_DIM
    q_head = b * T * row_stride + h * HEAD_DIM
    k_head = q_head + H * HEAD_DIM
    v_head = k_head + H * HEAD_DIM
    q_ptr = qkv_ptr + q_head
    dout_ptr += (b * T * H + h) * HEAD_DIM
    lse2_ptr = stats_ptr + (b * H + h) * 2 * R
    delta_ptr = lse2_ptr + R
    if SEGMENTS:
        segments_ptr += b * T
    k = load_tile(qkv_ptr + k_head, start_n, row_stride, T, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_tile(qkv_ptr + v_head, start_n, row_stride, T, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = start_n // BLOCK_M * BLOCK_M
    below = tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M
    crossed = tl.minimum(below, T)
    tl.assume(crossed > first)
    scale2 = scale * LOG2E
    cols = start_n + tl.arange(0, BLOCK_N)
    for crossing in tl.static_range(1, -1, -1):  # the queries on the diagonal, then those that see every key
        seg = load_segments(segments_ptr, cols, T, SEGMENTS)
        if DROPOUT:
            key_lo, key_hi = load_key(rng_ptr)
        for start in range(first if crossing else below, crossed if crossing else T, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            q = load_tile(q_ptr, start, row_stride, T, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            do = load_tile(dout_ptr, start, H * HEAD_DIM, T, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            lse2 = tl.load(lse2_ptr + rows)
            delta = tl.load(delta_ptr + rows)
            doc = document(segments_ptr, rows, T, SEGMENTS)
            s = dot(k, tl.trans(q))
            s = hide(s, rows[None, :], cols[:, None], doc[None, :], seg[:, None], crossing == 1, SEGMENTS)
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
    store_tile(dqkv_ptr + k_head, dk * scale, start_n, row_stride, T, HEAD_DIM)
    store_tile(dqkv_ptr + v_head, dv * kept_scale, start_n, row_stride, T, HEAD_DIM)
