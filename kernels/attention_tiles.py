"""What the attention kernels share: tiles of one head, visibility, configurations."""

import triton
import triton.language as tl

from . import tuning
from .aot import INTERPRETER
from .interpreter import cast
from .launch import GRID_LIMIT

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place(H):
    """(sequence, as int64, head, and both as one number for dropout) of a program of a grid (blocks, H, B)."""
    h = tl.program_id(1)
    return tl.program_id(2).to(tl.int64), h, tl.program_id(2) * H + h


@triton.jit
def load_tile(
    ptr,  # element 0 of row 0 of one head
    start,  # first row of the tile
    row_stride,  # elements between rows
    T,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,  # whether rows may pass T
):
    """Tile [ROWS, BLOCK_D], zero beyond row T and column HEAD_DIM."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(start, tl.int64) * row_stride + (rows[:, None] * row_stride + cols[None, :])
    if TAIL:
        if BLOCK_D == HEAD_DIM:
            tile = tl.load(ptrs, mask=(start + rows < T)[:, None], other=0.0)
        else:
            tile = tl.load(ptrs, mask=(start + rows < T)[:, None] & (cols < HEAD_DIM)[None, :], other=0.0)
    else:
        if BLOCK_D == HEAD_DIM:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=(cols < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    ptr,  # element 0 of row 0 of one head
    tile,  # [ROWS, BLOCK_D]
    start,  # first row of the tile
    row_stride,  # elements between rows
    T,
    HEAD_DIM: tl.constexpr,
):
    rows = tl.arange(0, tile.shape[0])
    cols = tl.arange(0, tile.shape[1])
    ptrs = ptr + tl.cast(start, tl.int64) * row_stride + (rows[:, None] * row_stride + cols[None, :])
    tl.store(ptrs, cast(tile, ptr.dtype.element_ty), mask=(start + rows < T)[:, None] & (cols < HEAD_DIM)[None, :])


@triton.jit
def hide(
    s,  # scores, either way round
    rows,  # query indices, shaped to broadcast against s
    cols,  # key indices, likewise
    doc,  # document of each query, likewise
    seg,  # segment of each key, likewise
    DIAGONAL: tl.constexpr,  # whether the tile crosses the diagonal
    SEGMENTS: tl.constexpr,
):
    """Scores with -inf where the query does not see the key. Keys beyond T are beyond the diagonal."""
    if DIAGONAL:
        s = tl.where(cols <= rows, s, float("-inf"))
    if SEGMENTS:
        s = tl.where(seg == doc, s, float("-inf"))
    return s


@triton.jit
def load_segments(segments_ptr, cols, T, SEGMENTS: tl.constexpr):
    """Segment of each key; without segments, a placeholder of the same shape."""
    seg = cols
    if SEGMENTS:
        seg = tl.load(segments_ptr + cols, mask=cols < T, other=-1)
    return seg


@triton.jit
def document(segments_ptr, rows, T, SEGMENTS: tl.constexpr):
    """Document of each query, ~value for padding; without segments, a placeholder of the same shape."""
    doc = load_segments(segments_ptr, rows, T, SEGMENTS)
    return tl.where(doc < 0, ~doc, doc)


@triton.jit
def load_lse2(lse_ptr, rows, T, SEGMENTS: tl.constexpr):
    """lse * log2(e); +inf, which makes every P of the row 0, beyond T and where the query sees nothing."""
    lse2 = tl.load(lse_ptr + rows, mask=rows < T, other=float("inf")) * LOG2E
    if SEGMENTS:
        lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
    return lse2


# Small, so that a few dozen tokens cross tile borders.
INTERPRETER_CONFIGS = {
    "forward": {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    "backward_dq": {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    "backward_dkdv": {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
}


def block_d(head_dim: int) -> int:
    """Width of a tile for heads of head_dim: a power of two, 32 to 128. Raises ValueError outside 16..128."""
    if not 16 <= head_dim <= 128:
        raise ValueError(f"head size {head_dim}: the Triton attention kernels take 16 to 128")
    return max(32, triton.next_power_of_2(head_dim))


def check_batch(sequences: int) -> None:
    """Raises ValueError for a batch that the grid's last axis, a sequence a program, cannot hold."""
    if sequences > GRID_LIMIT[2]:
        raise ValueError(f"a batch of {sequences} sequences is above {GRID_LIMIT[2]}, the most in one launch; split it")


def config(kernel: str, arch: int, itemsize: int, head_dim: int, dropout: bool) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages of one launch.

    What ships was picked from the machine code: no spills with or without segments, tensor-core instructions, and
    for sm_80 shared memory that also fits the smaller parts that take it (99 KiB on sm_86, sm_89 and sm_120). With
    dropout, Philox's registers ask for smaller tiles.
    """
    if arch == INTERPRETER:
        return INTERPRETER_CONFIGS[kernel]
    return tuning.config("attention", kernel, arch, itemsize, head_dim=block_d(head_dim), dropout=dropout)
