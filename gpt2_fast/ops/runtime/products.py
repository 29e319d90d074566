"""Matrix products: on a GPU cuBLAS; on a CPU this package's own or a vendor's, whichever `cpu_policy` names.

The own product (``csrc/linear.cpp``) reads either side transposed, and in a lower precision, without a pass that copies
it first; it adds to what is there, and takes GELU before it stores.
"""

from __future__ import annotations

import contextlib
import threading

import torch
from torch import Tensor
from torch.profiler import record_function

from gpt2_fast.ops.runtime import buffers, cpp, dispatch
from gpt2_fast.ops.runtime.cpu_policy import MIN_ROWS, cpu_policy
from gpt2_fast.ops.runtime.gelu import PARTIAL_CHUNKS, Gelu

PROFILED = "gpt2_fast.product"  # the own product's name in a profile
LINE = 64  # bytes of a cache line
_NOTHING = contextlib.nullcontext()
STORE, ADD, GELU = range(3)  # csrc/linear.h; GELU + Gelu.TANH, GELU + Gelu.ERF


class _Workspace(threading.local):
    """Each thread's memory for what is needed within a call, kept from one to the next: fresh pages cost more."""

    buffer: Tensor | None = None

    def take(self, nbytes: int) -> Tensor:
        """At least so many bytes, until the next call of this thread."""
        if self.buffer is None or self.buffer.numel() < nbytes:
            self.buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return self.buffer


WORKSPACE = _Workspace()


def _unit_stride(matrix: Tensor) -> Tensor:
    """The matrix, copied where neither of its strides is 1."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _without_overlap(matrix: Tensor) -> Tensor:
    """The matrix, copied where its elements lie upon each other or in no order that oneDNN has a name for."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    plain = (right == 1 and down >= columns) or (down == 1 and right >= rows)
    return matrix if plain else matrix.contiguous()


def _own_product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, finish: int, u: Tensor | None = None) -> None:
    """csrc/linear.cpp: out [M, N], rows of neighbouring elements, from a [M, K] @ b [K, N] + bias as `finish` says.

    Raises ValueError for an out whose rows are not that, or that is not laid out as u is.
    """
    (M, K), N = a.shape, b.shape[1]
    if (
        (N > 1 and out.stride(1) != 1)
        or (M > 1 and out.stride(0) < N)
        or (u is not None and u.stride() != out.stride())
    ):
        raise ValueError(
            f"product: the result's strides are {out.stride()}; its rows must be contiguous, and as u's are"
        )
    a, b, bias = _unit_stride(a), _unit_stride(b), None if bias is None else bias.float().contiguous()
    pairs = a.dtype == b.dtype == torch.bfloat16 and cpu_policy().native_bfloat16
    nbytes, threads = torch.empty(1, dtype=torch.int64, device="cpu"), torch.get_num_threads()
    cpp.linear_workspace(M=M, N=N, K=K, pairs=pairs, threads=threads, bytes=nbytes)
    (a_m, a_k), (b_k, b_n) = a.stride(), b.stride()
    with record_function(PROFILED) if torch.autograd._profiler_enabled() else _NOTHING:
        cpp.linear_product(
            a=a, a_m=a_m, a_k=a_k, b=b, b_k=b_k, b_n=b_n, bias=bias, c=out, c_m=out.stride(0), u=u, finish=finish,
            M=M, N=N, K=K, pairs=pairs, workspace=WORKSPACE.take(int(nbytes)), threads=threads,
        )  # fmt: skip


def _vendor_float32(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if cpu_policy().float32 == "onednn" and a.shape[0] > 1:
        # Computes a @ w^T for w [N, K]; a transposed view of b is what it wants.
        return torch.ops.mkldnn._linear_pointwise(_without_overlap(a), _without_overlap(b).t(), bias, "none", [], "")
    return _torch_product(a, b, bias)


def _torch_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own product; in a process that retains memory its result lies where activations and gradients do."""
    shape = (a.shape[0], b.shape[1])
    if not (a.is_cpu and buffers.takes(shape, a.dtype)):
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    out = buffers.empty(a, shape, a.dtype)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _vendor_product(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if a.is_cuda and out_dtype != a.dtype and bias is None:
        return torch.mm(a, b, out_dtype)
    native = not a.is_cpu or (a.dtype == b.dtype == torch.bfloat16 and cpu_policy().native_bfloat16)
    if native:
        result = _torch_product(a, b, bias)
    else:
        result = _vendor_float32(a.float(), b.float(), None if bias is None else bias.float())
    return result if result.dtype is out_dtype else result.to(out_dtype)


def takes_own(rows: int, dtype: torch.dtype) -> bool:
    """Whether a product of so many rows on a CPU is this package's own where nobody asks for one or the other."""
    if rows < MIN_ROWS or dispatch.unavailable("cpp", "cpu", dtype) is not None:
        return False
    return cpu_policy().takes_own(dtype, dispatch.extension().isa())


def takes_own_product(a: Tensor) -> bool:
    """Whether a @ b is this package's own product where nobody asks for one or the other."""
    return a.is_cpu and takes_own(a.shape[0], a.dtype)


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
    *,
    by_lines: bool = False,
) -> Tensor:
    """a [M, K] @ b [K, N] (+ bias [N]); either side may be a transposed view, neither is empty.

    Args:
        a, b, bias: on one device, and on a GPU of one dtype.
        out_dtype: a's unless given; float32 keeps what a widened product has before rounding.
        impl: "cpp", the own product, "aten", the vendor's, or "auto", by `cpu_policy`.
        by_lines: each row of the own product's result begins a cache line: the result is a view then, unless its rows
            are whole lines anyway. A tile of it is written, and read again, at half the lines.
    """
    out_dtype = out_dtype or a.dtype
    if impl == "cpp" or (impl == "auto" and takes_own_product(a)):
        (M, _), N = a.shape, b.shape[1]
        stride = -(-N // (line := LINE // out_dtype.itemsize)) * line if by_lines else N
        out = buffers.empty(a, (M, stride), out_dtype)[:, :N]
        _own_product(a, b, bias, out, STORE)
        return out
    return _vendor_product(a, b, bias, out_dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [M, N], float32 and contiguous, += a [M, K] @ b [K, N]."""
    if takes_own_product(a):
        _own_product(a, b, None, total, ADD)
    elif a.dtype == torch.float32 and (not a.is_cpu or cpu_policy().float32 == "mkl"):
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, torch.float32, out=total)  # no rounding before the addition, and no pass for it
    else:
        total += _vendor_product(a, b, None, a.dtype)


def gelu_product(
    a: Tensor, b: Tensor, bias: Tensor, dtype: torch.dtype, save: bool, kind: Gelu
) -> tuple[Tensor, Tensor | None]:
    """y = gelu(u), and u = a @ b + bias where `save` asks for it, both [M, N] in `dtype`: the own product alone."""
    shape = (a.shape[0], b.shape[1])
    y = buffers.empty(a, shape, dtype)
    u = buffers.empty(a, shape, dtype) if save else None
    _own_product(a, b, bias, y, GELU + kind, u)
    return y, u


def is_transposed(weight: Tensor) -> bool:
    """Whether weight [in, out] is a view of nn.Linear's [out, in]."""
    return weight.t().is_contiguous() and not weight.is_contiguous()


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, impl: str = "auto") -> Tensor:
    """x [N, in]^T @ dy [N, out] in weight's dtype, laid out as weight is, so that autograd need not copy it."""
    if is_transposed(weight):
        return product(dy.t(), x, out_dtype=weight.dtype, impl=impl).t()
    return product(x.t(), dy, out_dtype=weight.dtype, impl=impl)


def bias_gradient(dy: Tensor) -> Tensor:
    """dy [N, out] summed over its rows, in its dtype, by a kernel that sums in float32; torch's sum is slower."""
    kernels, index = ("triton", dy.get_device()) if dy.is_cuda else ("cpp", None)
    if dispatch.unavailable(kernels, dy.device.type, dy.dtype, index) is not None:
        return dy.sum(0)
    dy = dy.contiguous()
    if dy.is_cuda:
        from gpt2_fast.kernels.bias import column_sum

        return column_sum(dy, dy.dtype)
    (N, width), chunks = dy.shape, min(len(dy), PARTIAL_CHUNKS)
    partial, total = dy.new_empty(chunks, width, dtype=torch.float32), dy.new_empty(width)
    cpp.column_sum(x=dy, partial=partial, chunks=chunks, sum=total, N=N, F=width)
    return total
