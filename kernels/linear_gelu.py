"""Products of the MLP with what follows them in registers: bias and GELU forward, GELU's derivative backward.

    forward:    u = x @ weight + bias                  y = gelu(u)
    backward:   du = (dm @ weight^T) * gelu'(u)        dbias = sum over rows of du

Forward it is c_fc's weight [C, F], backward c_proj's [F, O], both as Conv1D lays them out. After a vendor's product a
pass reads u again to make y; backward the product is written, and read again beside u. Here neither is.

The kernels are persistent: as many programs as the card has multiprocessors, each of which takes tile after tile. The
two loops, over tiles and over K, are flattened into one, so that the next tile's operands are on their way while a tile
is finished, a quarter of its columns after the other: with halves, backward spills in Triton 3.9. Operands come and
results go by tensor descriptors (TMA), made on the host: those need no scratch memory. Sums are taken in a fixed order.

A configuration chooses: "product" is "vendor" or "persistent", and the rest is what the persistent kernel would take.
`config_for` says which, and that what TMA cannot take is the vendor's.
"""

from __future__ import annotations

import functools
import itertools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .aot import ARCHS, INTERPRETER, AotSpec, config_arch, make_spec
from .bias import reduce_partials
from .gelu import gelu_derivative, gelu_gate
from .interpreter import cast, dot
from .launch import launch

OP = "linear_gelu"
GROUP_M = 8
ALIGNED = 16  # bytes: addresses and rows (CUDA driver API, cuTensorMapEncodeTiled)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile. They go down GROUP_M rows before the next column: the group's rows stay in L2."""
    group = tile // (GROUP_M * tiles_n)
    within = tile % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % height, within // height


@triton.jit
def _product(
    a_desc,
    b_desc,
    row,
    col,
    K: tl.constexpr,
    B_ROWS: tl.constexpr,  # b's descriptor is of [N, K]
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of a @ b, float32, in quarters of its columns from left to right."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # K is known to the compiler: with steps that may be none it finishes tiles in a second place, 1,800 instructions.
    for k in range(tl.cdiv(K, BLOCK_K)):
        a = a_desc.load([row * BLOCK_M, k * BLOCK_K])
        if B_ROWS:
            b = b_desc.load([col * BLOCK_N, k * BLOCK_K]).T
        else:
            b = b_desc.load([k * BLOCK_K, col * BLOCK_N])
        acc = dot(a, b, acc)
    left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    first, second = left.reshape(BLOCK_M, 2, BLOCK_N // 4).permute(0, 2, 1).split()
    third, fourth = right.reshape(BLOCK_M, 2, BLOCK_N // 4).permute(0, 2, 1).split()
    return first, second, third, fourth


@triton.jit
def forward_kernel(
    a_desc,  # [M, K] in tiles of [BLOCK_M, BLOCK_K]
    b_desc,  # [K, N] in tiles of [BLOCK_K, BLOCK_N]
    bias_ptr,  # [N]
    u_desc,  # [M, N] in tiles of [BLOCK_M, BLOCK_N // 4]
    y_desc,  # as u
    M,
    N,
    K: tl.constexpr,
    ERF: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        row, col = _place(tile, tiles_m, tiles_n, GROUP_M)
        quarters = _product(a_desc, b_desc, row, col, K, False, BLOCK_M, BLOCK_N, BLOCK_K)
        for quarter in tl.static_range(4):
            first = col * BLOCK_N + quarter * (BLOCK_N // 4)
            cols = first + tl.arange(0, BLOCK_N // 4)
            u = quarters[quarter] + tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
            u_desc.store([row * BLOCK_M, first], cast(u, u_desc.dtype))
            y_desc.store([row * BLOCK_M, first], cast(u * gelu_gate(u, ERF), y_desc.dtype))


@triton.jit
def backward_kernel(
    a_desc,  # [M, K] in tiles of [BLOCK_M, BLOCK_K]
    b_desc,  # [N, K] in tiles of [BLOCK_N, BLOCK_K]
    u_desc,  # [M, N] in tiles of [BLOCK_M, BLOCK_N // 4]
    du_desc,  # as u
    partial_ptr,  # float32 [tiles of rows, N]
    M,
    N,
    K: tl.constexpr,
    ERF: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        row, col = _place(tile, tiles_m, tiles_n, GROUP_M)
        quarters = _product(a_desc, b_desc, row, col, K, True, BLOCK_M, BLOCK_N, BLOCK_K)
        for quarter in tl.static_range(4):
            first = col * BLOCK_N + quarter * (BLOCK_N // 4)
            cols = first + tl.arange(0, BLOCK_N // 4)
            # Rows past M are read as 0, and so is their du: they add nothing to the sums.
            du = quarters[quarter] * gelu_derivative(u_desc.load([row * BLOCK_M, first]).to(tl.float32), ERF)
            du_desc.store([row * BLOCK_M, first], cast(du, du_desc.dtype))
            tl.store(partial_ptr + row.to(tl.int64) * N + cols, tl.sum(du, axis=0), mask=cols < N)


def _describable(matrix: torch.Tensor) -> bool:
    """Whether a tensor descriptor can stand for a matrix of two bytes an element."""
    (_, columns), (down, right) = matrix.shape, matrix.stride()
    aligned = 2 * down % ALIGNED == 0 and matrix.data_ptr() % ALIGNED == 0
    return right == 1 and down >= columns > 0 and aligned


def config_for(kernel: str, a: torch.Tensor, weight: torch.Tensor, u: torch.Tensor | None = None) -> dict | None:
    """The persistent kernel's configuration for a product, or None where that is the vendor's.

    The vendor's are: what the table says so of, float32, tensors of several dtypes, and what TMA does not take: a
    result whose width is no multiple of 8, a matrix that begins, or whose rows begin, off a multiple of 16 bytes, and
    one whose rows are not contiguous (nn.Linear's weight, transposed).

    Args:
        kernel: "forward" or "backward".
        a, weight, u: what the launcher of that name takes; forward has no u.
    """
    found = tuning.config(OP, kernel, config_arch(a.device), a.element_size(), width=a.shape[1])
    matrices = [a, weight] if u is None else [a, weight, u]
    if found["product"] == "vendor" or a.element_size() != 2 or 2 * matrices[-1].shape[1] % ALIGNED:
        return None
    return found if all(t.dtype == a.dtype and _describable(t) for t in matrices) else None


@functools.lru_cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _grid(a: torch.Tensor, features: int, config: dict) -> tuple[int]:
    tiles = triton.cdiv(a.shape[0], config["BLOCK_M"]) * triton.cdiv(features, config["BLOCK_N"])
    # In the interpreter two programs, so that each has tiles of its own and several.
    programs = 2 if config_arch(a.device) == INTERPRETER else _multiprocessors(a.device.index)
    return (min(tiles, programs),)


def _described(matrix: torch.Tensor, *tile: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(tile))


def _launch(kernel, a: torch.Tensor, weight: torch.Tensor, erf: bool, config: dict, **others: torch.Tensor) -> None:
    """others: the kernel's arguments by name; those named *_desc are matrices [M, N]."""
    M, N, K = (config[f"BLOCK_{edge}"] for edge in "MNK")
    forward = kernel is forward_kernel
    wide = {name: _described(t, M, N // 4) if name.endswith("_desc") else t for name, t in others.items()}
    features = others["u_desc"].shape[1]
    options = {key: value for key, value in config.items() if key != "product"}
    launch(
        kernel,
        _grid(a, features, config),
        a_desc=_described(a, M, K),
        b_desc=_described(weight, K, N) if forward else _described(weight, N, K),
        **wide,
        M=a.shape[0],
        N=features,
        K=a.shape[1],
        ERF=erf,
        GROUP_M=GROUP_M,
        **options,
    )


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, erf: bool, config: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], weight [K, N], bias [N] -> u [M, N] = x @ weight + bias and gelu(u). config: `config_for`'s."""
    u, y = (torch.empty((x.shape[0], weight.shape[1]), dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(forward_kernel, x, weight, erf, config, bias_ptr=bias, u_desc=u, y_desc=y)
    return u, y


def backward(
    dm: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    erf: bool,
    config: dict,
    sums_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dm [M, K], weight [N, K], u [M, N] -> du [M, N] = (dm @ weight^T) * gelu'(u), and its sum over the rows, [N] in
    sums_dtype. config: `config_for`'s."""
    du = torch.empty_like(u)
    partials = torch.empty(
        (1, triton.cdiv(u.shape[0], config["BLOCK_M"]), u.shape[1]), dtype=torch.float32, device=u.device
    )
    _launch(backward_kernel, dm, weight, erf, config, u_desc=u, du_desc=du, partial_ptr=partials)
    return du, reduce_partials(partials, sums_dtype).squeeze(0)


def aot_specs() -> list[AotSpec]:
    """Where an architecture has tiles, whichever product is chosen there: float16 and bfloat16, both GELUs."""
    specs = []
    for arch, kernel in itertools.product(ARCHS, (forward_kernel, backward_kernel)):
        config = tuning.config(OP, kernel.__name__.removesuffix("_kernel"), arch, 2, width=768)
        if "num_warps" in config:
            forms = itertools.product(("bf16", "fp16"), (False, True))
            specs += [_spec(arch, kernel, config, *form) for form in forms]
    return specs


def _spec(arch: int, kernel, config: dict, dtype: str, erf: bool) -> AotSpec:
    M, N, K = (config[f"BLOCK_{edge}"] for edge in "MNK")
    tile = lambda down, right: f"tensordesc<{dtype}[{down}, {right}]>"
    sides = {"a_desc": tile(M, K), "b_desc": tile(K, N) if kernel is forward_kernel else tile(N, K)}
    wide = {name: tile(M, N // 4) for name in ("u_desc", "y_desc", "du_desc")}
    types = {**sides, **wide, "bias_ptr": f"*{dtype}", "partial_ptr": "*fp32", "M": "i32", "N": "i32"}
    types = {name: types[name] for name in kernel.arg_names if name in types}
    name = f"{OP}.{kernel.__name__.removesuffix('_kernel')} {dtype}{' erf' * erf}"
    constexprs = {"K": 768, "ERF": erf, "GROUP_M": GROUP_M}
    unaligned = ("M", *(name for name in types if name.endswith("_desc")))
    return make_spec(kernel, name, types, constexprs, config, (arch,), unaligned=unaligned)
