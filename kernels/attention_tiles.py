"""What the attention kernels share: tiles of one head, visibility, configurations."""

import functools

import torch
import triton
import triton.language as tl

from .interpreter import cast

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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


# (kernel, compute capability, bytes an element, BLOCK_D) -> (BLOCK_M, BLOCK_N, num_warps, num_stages).
# Picked from the machine code: no spills with or without segments, tensor-core instructions, shared memory that
# also fits the smaller parts of a generation (99 KiB on sm_86, sm_89 and sm_120, which take sm_80's).
CONFIGS = {
    (*key, width): config
    for key, row in {
        ("forward", 80, 2): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        ("forward", 90, 2): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        ("forward", 100, 2): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
        ("forward", 80, 4): ((32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
        ("forward", 90, 4): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
        ("forward", 100, 4): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
        ("backward_dq", 80, 2): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        ("backward_dq", 90, 2): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
        ("backward_dq", 100, 2): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
        ("backward_dq", 80, 4): ((32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 1)),
        ("backward_dq", 90, 4): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
        ("backward_dq", 100, 4): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
        ("backward_dkdv", 80, 2): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        ("backward_dkdv", 90, 2): ((64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2)),
        ("backward_dkdv", 100, 2): ((64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2)),
        ("backward_dkdv", 80, 4): ((32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
        ("backward_dkdv", 90, 4): ((32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
        ("backward_dkdv", 100, 4): ((32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    }.items()
    for width, config in zip((32, 64, 128), row, strict=True)
}
# With dropout, where Philox's registers ask for a smaller tile.
DROPOUT_CONFIGS = {
    (*key, width): config
    for key, row in {
        ("forward", 80, 2): ((128, 32, 8, 3), (128, 32, 8, 3), (64, 64, 8, 2)),
        ("forward", 90, 2): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        ("forward", 100, 2): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        ("backward_dq", 80, 2): ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
        ("backward_dq", 90, 2): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        ("backward_dq", 100, 2): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        ("backward_dkdv", 80, 2): ((32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
        ("backward_dkdv", 90, 2): ((32, 64, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2)),
        ("backward_dkdv", 100, 2): ((32, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    }.items()
    for width, config in zip((32, 64, 128), row, strict=True)
}
# Small, so that a few dozen tokens cross tile borders.
INTERPRETER_CONFIGS = {
    "forward": (32, 16, 4, 1),
    "backward_dq": (16, 32, 4, 1),
    "backward_dkdv": (32, 16, 4, 1),
}


def block_d(head_dim: int) -> int:
    """Width of a tile for heads of head_dim: a power of two, 32 to 128. Raises ValueError outside 16..128."""
    if not 16 <= head_dim <= 128:
        raise ValueError(f"head size {head_dim}: the Triton attention kernels take 16 to 128")
    return max(32, triton.next_power_of_2(head_dim))


@functools.lru_cache
def config_arch(device: torch.device) -> int | str:
    """Architecture whose configurations `device` runs: 80, 90, 100, or "interpret" for CPU tensors."""
    if device.type == "cpu":
        return "interpret"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


def config(kernel: str, arch: int | str, itemsize: int, head_dim: int, dropout: bool) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) of one launch."""
    if arch == "interpret":
        return INTERPRETER_CONFIGS[kernel]
    key = kernel, arch, itemsize, block_d(head_dim)
    return DROPOUT_CONFIGS.get(key, CONFIGS[key]) if dropout else CONFIGS[key]
