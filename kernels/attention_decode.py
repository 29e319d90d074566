"""Attention of one query a head against a KV cache, split over keys (Flash-Decoding, Dao et al., 2023).

    out = softmax(scale q K^T) V  over the keys starts <= j < lengths of each sequence

1. Each program takes SPLIT consecutive keys of one head, counted from the sequence's first visible key, and
   writes the maximum of their scores, the sum of exponentials and the unnormalised output, in float32.
2. One program a head combines the splits in order of their index.

The cut depends only on where a sequence starts, never on the batch, its padding or the cache's capacity, and no
atomics are used: a sequence decodes to the same bits alone and in any batch. Nothing here is a matrix product
worth a tensor core (one row a head); the bound is reading K and V once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .aot import ARCHS, INTERPRETER, AotSpec, config_arch, forms_for, make_spec
from .attention_tiles import LOG2E, block_d, check_batch
from .interpreter import cast
from .launch import launch

SPLIT = 128  # keys a program of the first kernel
INTERPRETER_CONFIG = {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


def _config(kernel: str, arch: int, itemsize: int, head_dim: int) -> dict[str, int]:
    """Of the split what ships keeps a thread's part of K and V well inside its registers, and enough loads in flight
    to cover memory latency."""
    if kernel == "split" and arch == INTERPRETER:
        return INTERPRETER_CONFIG
    return tuning.config("attention_decode", kernel, arch, itemsize, head_dim=block_d(head_dim))


@triton.jit(do_not_specialize=["S", "H"])
def split_kernel(
    q_ptr,  # [B, H, D]
    k_ptr,  # [B, H, S, D]
    v_ptr,  # [B, H, S, D]
    starts_ptr,  # [B] int32, first visible key
    lengths_ptr,  # [B] int32, end of the visible keys
    acc_ptr,  # [B, H, P, D] f32, unnormalised output of each split
    stats_ptr,  # [B, H, P, 2] f32: maximum (in units of log 2) and sum
    scale,  # f32
    S,
    H,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,  # keys of a split
):
    split = tl.program_id(0)
    b = tl.program_id(2)
    head = b.to(tl.int64) * H + tl.program_id(1)
    first = tl.minimum(tl.maximum(tl.load(starts_ptr + b), 0), S) + split * KEYS
    end = tl.minimum(tl.minimum(first + KEYS, tl.load(lengths_ptr + b)), S)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    q = tl.load(q_ptr + head * HEAD_DIM + d, mask=in_head, other=0.0).to(tl.float32) * (scale * LOG2E)
    m = tl.full([], float("-inf"), tl.float32)
    l = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_N):
        n = tl.arange(0, BLOCK_N)
        visible = start + n < end
        mask = visible[:, None] & in_head[None, :]
        offset = (head * S + start) * HEAD_DIM
        k = tl.load(k_ptr + offset + (n[:, None] * HEAD_DIM + d[None, :]), mask=mask, other=0.0)
        v = tl.load(v_ptr + offset + (n[:, None] * HEAD_DIM + d[None, :]), mask=mask, other=0.0)
        s = tl.where(visible, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        p = tl.math.exp2(s - m_new)
        alpha = tl.math.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * v.to(tl.float32), 0)
        m = m_new
    part = head * tl.num_programs(0) + split
    tl.store(acc_ptr + part * HEAD_DIM + d, acc, mask=in_head)
    tl.store(stats_ptr + part * 2, m)
    tl.store(stats_ptr + part * 2 + 1, l)


@triton.jit(do_not_specialize=["P"])
def combine_kernel(
    acc_ptr,  # [B, H, P, D] f32
    stats_ptr,  # [B, H, P, 2] f32
    out_ptr,  # [B, H, D]
    P,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m = tl.full([], float("-inf"), tl.float32)
    l = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, P, BLOCK_P):
        splits = start + tl.arange(0, BLOCK_P)
        part = head * P + splits
        m_part = tl.load(stats_ptr + part * 2, mask=splits < P, other=float("-inf"))
        l_part = tl.load(stats_ptr + part * 2 + 1, mask=splits < P, other=0.0)
        mask = (splits < P)[:, None] & (d < HEAD_DIM)[None, :]
        acc_part = tl.load(acc_ptr + part[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m, tl.max(m_part, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.math.exp2(m_part - shift)
        alpha = tl.math.exp2(m - shift)
        l = l * alpha + tl.sum(weight * l_part, 0)
        acc = acc * alpha + tl.sum(weight[:, None] * acc_part, 0)
        m = m_new
    out = acc / tl.where(l == 0.0, 1.0, l)
    tl.store(out_ptr + head * HEAD_DIM + d, cast(out, out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Output [B, H, D] of q [B, H, D] against k_cache and v_cache [B, H, S, D] (contiguous, one dtype).

    starts, lengths: int32 [B]; sequence b sees keys starts[b] <= j < lengths[b] of the S there are, and is 0 where
    there is none.
    Reads nothing back to the host. Raises ValueError for a head size outside 16..128 or more than 65535 sequences.
    """
    B, H, S, D = k_cache.shape
    check_batch(B)
    split, combine = (_config(kernel, config_arch(q.device), q.element_size(), D) for kernel in ("split", "combine"))
    n_splits = triton.cdiv(S, SPLIT)
    out = torch.empty_like(q)
    acc = torch.empty((B, H, n_splits, D), dtype=torch.float32, device=q.device)
    stats = torch.empty((B, H, n_splits, 2), dtype=torch.float32, device=q.device)
    tile = {"HEAD_DIM": D, "BLOCK_D": block_d(D)}
    tensors = (q, k_cache, v_cache, starts, lengths, acc, stats)
    launch(split_kernel, (n_splits, H, B), *tensors, scale, S, H, KEYS=SPLIT, **tile, **split)
    launch(combine_kernel, (B * H,), acc, stats, out, n_splits, **tile, **combine)
    return out


def aot_specs() -> list[AotSpec]:
    """Every configuration of both kernels; at two bytes bfloat16, and float16 for head size 64; the
    padded head size 80 too."""
    forms = [(D, "bf16", 2) for D in (32, 64, 80, 128)] + [(64, "fp16", 2)]
    forms += [(D, "fp32", 4) for D in (32, 64, 80, 128)]
    parts = {"acc_ptr": "*fp32", "stats_ptr": "*fp32"}
    specs = []
    of_archs = [(arch, *form) for arch in ARCHS for form in forms_for(arch, forms)]
    for arch, D, dtype, itemsize in of_archs:
        tile, label = {"HEAD_DIM": D, "BLOCK_D": block_d(D)}, f"{dtype} D={D}"
        split, combine = (_config(kernel, arch, itemsize, D) for kernel in ("split", "combine"))
        types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
        types |= {"starts_ptr": "*i32", "lengths_ptr": "*i32", **parts, "scale": "fp32", "S": "i32", "H": "i32"}
        name, loose = f"attention_decode.split {label}", ("S", "H")
        specs.append(make_spec(split_kernel, name, types, {**tile, "KEYS": SPLIT}, split, (arch,), unaligned=loose))
        types, name = {**parts, "out_ptr": f"*{dtype}", "P": "i32"}, f"attention_decode.combine {label}"
        specs.append(make_spec(combine_kernel, name, types, tile, combine, (arch,), unaligned=("P",)))
    return specs
