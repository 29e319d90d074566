"""Counter-based dropout masks: Philox4x32-10 (Salmon et al., SC 2011; Random123), word for word.

An element has coordinates (z, row, col). Its word is output ``col & 3`` of Philox4x32-10 with

    counter = (col >> 2, row, z, site)        key = (low 32 bits, high 32 bits) of the int64 ``rng[0]``

and the element is kept iff word >= threshold (unsigned). Four neighbouring columns are the four outputs of
one call, so a tile of C columns costs C / 4 calls a row; its first column must therefore be a multiple of 4.
Nothing is stored for backward: the mask is a function of the coordinates.
"""

import triton
import triton.language as tl


def threshold_bits(dropout_p: float) -> int:
    """Bit pattern, as a signed 32-bit int, of the uint32 threshold ``int(p * 2**32)``.

    Signed, because Triton would type an argument of 2**31 or more as 64 bits wide and compile once more.
    """
    threshold = min(max(int(dropout_p * 2.0**32), 0), 2**32 - 1)
    return threshold - 2**32 if threshold >= 2**31 else threshold


def keep_scale(dropout_p: float) -> float:
    """Factor on kept elements, 1 / (1 - p); 0 for p = 1, where nothing is kept."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


@triton.jit
def load_key(rng_ptr):
    """(low, high) uint32 halves of the int64 at ``rng_ptr``."""
    key = tl.load(rng_ptr)
    return (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def keep_tile(
    key_lo,  # uint32, from load_key
    key_hi,  # uint32, from load_key
    threshold,  # int32, from threshold_bits
    site,  # int32, which dropout of the model
    z,  # int32
    rows,  # [R] int, absolute rows
    col_start,  # int, absolute first column, a multiple of 4
    COLS: tl.constexpr,  # a power of two, at least 4
):
    """Keep mask [R, COLS], bool, of the tile whose rows are ``rows`` and whose first column is col_start."""
    col4 = col_start // 4 + tl.arange(0, COLS // 4)
    w0, w1, w2, w3 = tl.philox_impl(
        col4[None, :].to(tl.uint32),
        rows[:, None].to(tl.uint32),
        tl.cast(z, tl.uint32),
        tl.cast(site, tl.uint32),
        key_lo,
        key_hi,
    )
    limit = tl.cast(threshold, tl.uint32, bitcast=True)
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (rows.shape[0], COLS)) != 0


@triton.jit
def keep_row(
    key_lo,  # uint32, from load_key
    key_hi,  # uint32, from load_key
    threshold,  # int32, from threshold_bits
    site,  # int32, which dropout of the model
    row,  # int, absolute row; z = 0
    col_start,  # int, absolute first column, a multiple of 4
    COLS: tl.constexpr,  # a power of two, at least 4
):
    """Keep mask [COLS], bool, of one row of an [N, C] tensor from column ``col_start``."""
    col4 = col_start // 4 + tl.arange(0, COLS // 4)
    zero = tl.full((), 0, tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        col4.to(tl.uint32), tl.cast(row, tl.uint32), zero, tl.cast(site, tl.uint32), key_lo, key_hi
    )
    limit = tl.cast(threshold, tl.uint32, bitcast=True)
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (COLS,)) != 0
