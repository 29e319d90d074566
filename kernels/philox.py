"""Dropout masks in Triton, to the bit those of gpt2_fast/ops/runtime/philox.py, which says what an element's number is.

Where the eight elements of a block are held by one thread, Triton moves the whole computation to where the mask is used
and no number passes through shared memory. That is why words are joined, permuted and only then compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)
STEPS = 65536


def _dropped(dropout_p: float) -> int:
    return min(max(int(dropout_p * STEPS + 0.5), 0), STEPS - 1)


def threshold_bits(dropout_p: float) -> int:
    """Bit pattern, as a signed 32-bit int, of the uint32 threshold: p in 65536ths, in the high half.

    Signed, because Triton would type an argument of 2**31 or more as 64 bits wide and compile once more.
    """
    threshold = _dropped(dropout_p) << 16
    return threshold - 2**32 if threshold >= 2**31 else threshold


def keep_scale(dropout_p: float) -> float:
    """Factor on kept elements: the inverse of the probability that one is."""
    return STEPS / (STEPS - _dropped(dropout_p))


class Dropout(NamedTuple):
    """What a launcher drops. Any object with these three attributes will do."""

    p: float = 0.0
    key: torch.Tensor | None = None  # int64 [1], read when p is above 0
    site: int = 0  # which dropout of the model


def arguments(dropout: Dropout) -> dict[str, Any]:
    """The arguments of every kernel that drops. Raises ValueError for a dropout without a key."""
    if dropout.p > 0.0 and dropout.key is None:
        raise ValueError(f"dropout of p = {dropout.p} needs a key, int64 [1]: that of the forward pass")
    return {
        "rng_ptr": dropout.key if dropout.p > 0.0 else None,
        "kept_scale": keep_scale(dropout.p),
        "threshold": threshold_bits(dropout.p),
        "site": dropout.site,
        "DROPOUT": dropout.p > 0.0,
    }


@triton.jit
def load_key(rng_ptr):
    """(low, high) uint32 halves of the int64 at ``rng_ptr``."""
    key = tl.load(rng_ptr)
    return (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _block(c0, c1, z, site, key_lo, key_hi):
    z, site = tl.cast(z, tl.uint32), tl.cast(site, tl.uint32)
    return tl.philox_impl(c0.to(tl.uint32), c1.to(tl.uint32), z, site, key_lo, key_hi, n_rounds=ROUNDS)


@triton.jit
def _numbers(w0, w1, w2, w3):
    """uint32 [..., 2, 2, 2], by the bits of a number's index; it is the high half, what is below changes nothing."""
    low = tl.join(tl.join(w0 << 16, w2 << 16), tl.join(w1 << 16, w3 << 16))
    return tl.join(low, tl.join(tl.join(w0, w2), tl.join(w1, w3)))


@triton.jit
def keep_rows(
    key_lo,  # uint32, from load_key
    key_hi,  # uint32, from load_key
    threshold,  # int32, from threshold_bits
    site,  # int32, which dropout of the model
    rows,  # [R] int, absolute rows
    COLS: tl.constexpr,  # a power of two, at least 8
):
    """Keep mask [R, COLS], bool, of whole rows of a row-wise op."""
    eights = tl.arange(0, COLS // 8)
    numbers = _numbers(*_block(eights[None, :], rows[:, None], 0, site, key_lo, key_hi))
    return tl.reshape(numbers, (rows.shape[0], COLS)) >= tl.cast(threshold, tl.uint32, bitcast=True)


@triton.jit
def keep_tile(
    key_lo,  # uint32, from load_key
    key_hi,  # uint32, from load_key
    threshold,  # int32, from threshold_bits
    site,  # int32, which dropout of the model
    z,  # int32
    row_start,  # int, absolute first row, a multiple of 16, likewise col_start
    col_start,
    ROWS: tl.constexpr,  # a power of two, at least 16, likewise COLS
    COLS: tl.constexpr,
):
    """Keep mask [ROWS, COLS], bool, of a tile of attention."""
    c0 = col_start // 4 + tl.arange(0, COLS // 4)
    c1 = row_start // 2 + tl.arange(0, ROWS // 2)
    numbers = _numbers(*_block(c0[None, :], c1[:, None], z, site, key_lo, key_hi))
    numbers = tl.reshape(numbers, (ROWS // 16, 8, COLS // 16, 4, 2, 2, 2))
    numbers = tl.permute(numbers, (0, 4, 1, 2, 5, 3, 6))
    return tl.reshape(numbers, (ROWS, COLS)) >= tl.cast(threshold, tl.uint32, bitcast=True)


@triton.jit
def keep_tile_transposed(
    key_lo,  # as in keep_tile, all of them
    key_hi,
    threshold,
    site,
    z,
    row_start,
    col_start,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Keep mask [COLS, ROWS], bool, of the same tile. A thread holds half of a block: it is computed twice."""
    cols = col_start // 2 + tl.arange(0, COLS // 2)  # without bit 3
    c1 = row_start // 2 + tl.arange(0, ROWS // 2)
    w0, w1, w2, w3 = _block((cols >> 1)[:, None], c1[None, :], z, site, key_lo, key_hi)
    shift = tl.where((cols & 1) == 0, 16, 0)[:, None].to(tl.uint32)
    numbers = tl.join(tl.join(w0 << shift, w1 << shift), tl.join(w2 << shift, w3 << shift))
    numbers = tl.reshape(numbers, (COLS // 16, 8, ROWS // 16, 8, 2, 2))
    numbers = tl.permute(numbers, (0, 4, 1, 2, 5, 3))
    return tl.reshape(numbers, (COLS, ROWS)) >= tl.cast(threshold, tl.uint32, bitcast=True)
