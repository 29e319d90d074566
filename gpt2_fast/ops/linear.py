"""y = x @ weight + bias with GPT-2's Conv1D weight [in, out].

    dx = dy @ weight^T          dweight = x^T @ dy          dbias = sum over rows of dy

On a GPU this is cuBLAS. On a CPU it is this package's own product or a vendor's, whichever `cpu_policy` names for the
processor. The own one reads either side transposed, and in a lower precision, without a pass that copies it first; it
adds to what is there (`add_product`), and takes GELU before it stores (`gelu_product`).

Saved for backward: x, or instead of it, where x = gelu(u) and u is kept anyway, u: x is one pass over it away.
"""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from gpt2_fast.ops.runtime import buffers, dispatch
from gpt2_fast.ops.runtime.cpu_policy import MIN_ROWS, cpu_policy
from gpt2_fast.ops.runtime.dispatch import DTYPE_CODES, address
from gpt2_fast.ops.runtime.library import define

OP = "linear"
PROFILED = "gpt2_fast.product"  # the own product's name in a profile
STORE, ADD, TANH_GELU, ERF_GELU = range(4)  # csrc/linear.h


class _Workspace(threading.local):
    """Each thread's memory for packed operands, kept from one product to the next: fresh pages cost more."""

    buffer: Tensor | None = None

    def take(self, nbytes: int) -> Tensor:
        if self.buffer is None or self.buffer.numel() < nbytes:
            self.buffer = torch.empty(nbytes, dtype=torch.uint8)
        return self.buffer


_workspace = _Workspace()


def _unit_stride(matrix: Tensor) -> Tensor:
    """The matrix, copied where neither of its strides is 1."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _own_product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, finish: int, u: Tensor | None = None) -> None:
    """csrc/linear.cpp: out [M, N], contiguous, from a [M, K] @ b [K, N] + bias as `finish` says."""
    (M, K), N = a.shape, b.shape[1]
    if 0 in (M, N, K):
        raise ValueError(f"{OP}: a product of {tuple(a.shape)} and {tuple(b.shape)} has no element")
    a, b, bias = _unit_stride(a), _unit_stride(b), None if bias is None else bias.float()
    pairs = a.dtype == b.dtype == torch.bfloat16 and cpu_policy().native_bfloat16
    nbytes, extension = torch.empty(1, dtype=torch.int64), dispatch.extension()
    extension.linear_workspace(M, N, K, pairs, address(nbytes))
    with record_function(PROFILED):
        extension.linear_product(
            address(a), DTYPE_CODES[a.dtype], *a.stride(), address(b), DTYPE_CODES[b.dtype], *b.stride(),
            address(bias), address(out), address(u), DTYPE_CODES[out.dtype], finish, M, N, K, pairs,
            address(_workspace.take(int(nbytes))), torch.get_num_threads(),
        )  # fmt: skip


def _vendor_float32(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if cpu_policy().float32 == "onednn" and a.shape[0] > 1:
        # Computes a @ w^T for w [N, K]; a transposed view of b is what it wants.
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def _vendor_product(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if a.device.type == "cuda" and out_dtype != a.dtype and bias is None:
        return torch.mm(a, b, out_dtype)
    native = a.device.type != "cpu" or (a.dtype == b.dtype == torch.bfloat16 and cpu_policy().native_bfloat16)
    if native:
        result = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    else:
        result = _vendor_float32(a.float(), b.float(), None if bias is None else bias.float())
    return result.to(out_dtype)


def takes_own_product(a: Tensor, b: Tensor) -> bool:
    """Whether a @ b is this package's own product where nobody asks for one or the other."""
    own = a.device.type == "cpu" and cpu_policy().own and dispatch.unavailable("cpp", "cpu", a.dtype) is None
    return own and a.shape[0] >= MIN_ROWS and b.numel() > 0


def product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None, impl: str = "auto"
) -> Tensor:
    """a [M, K] @ b [K, N] (+ bias [N]); either side may be a transposed view.

    Args:
        a, b, bias: on one device, and on a GPU of one dtype.
        out_dtype: a's unless given; float32 keeps what a widened product has before rounding.
        impl: "cpp", the own product, "aten", the vendor's, or "auto", by `cpu_policy`.
    """
    out_dtype = out_dtype or a.dtype
    if (impl == "cpp" and 0 not in (*a.shape, *b.shape)) or (impl == "auto" and takes_own_product(a, b)):
        shape = (a.shape[0], b.shape[1])
        out = buffers.empty(a, shape, out_dtype)
        _own_product(a, b, bias, out, STORE)
        return out
    return _vendor_product(a, b, bias, out_dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [M, N], float32 and contiguous, += a [M, K] @ b [K, N]."""
    if takes_own_product(a, b):
        _own_product(a, b, None, total, ADD)
    elif a.dtype == torch.float32 and (a.device.type != "cpu" or cpu_policy().float32 == "mkl"):
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, torch.float32, out=total)  # no rounding before the addition, and no pass for it
    else:
        total += _vendor_product(a, b, None, a.dtype)


def gelu_product(
    a: Tensor, b: Tensor, bias: Tensor, dtype: torch.dtype, save: bool, erf: bool
) -> tuple[Tensor, Tensor | None]:
    """y = gelu(u), and u = a @ b + bias where `save` asks for it, both [M, N] in `dtype`: the own product alone."""
    shape = (a.shape[0], b.shape[1])
    y = buffers.empty(a, shape, dtype)
    u = buffers.empty(a, shape, dtype) if save else None
    _own_product(a, b, bias, y, ERF_GELU if erf else TANH_GELU, u)
    return y, u


def gelu(u: Tensor, approximate: str) -> Tensor:
    """F.gelu(u [N, F], approximate), in u's dtype; by the C++ kernels to the bits that `gelu_product` gave for u."""
    if u.device.type != "cpu" or dispatch.unavailable("cpp", "cpu", u.dtype) is not None:
        return F.gelu(u, approximate=approximate)
    u, y = u.contiguous(), buffers.empty(u, u.shape, u.dtype)
    dispatch.extension().gelu(address(u), address(y), *u.shape, DTYPE_CODES[u.dtype], approximate == "none")
    return y


def _is_transposed(weight: Tensor) -> bool:
    """Whether weight [in, out] is a view of nn.Linear's [out, in]."""
    return weight.t().is_contiguous() and not weight.is_contiguous()


def empty_gradient(weight: Tensor) -> Tensor:
    """Uninitialised, with the strides of `weight_gradient`'s result."""
    if _is_transposed(weight):
        return weight.new_empty(weight.shape[::-1]).t()
    return weight.new_empty(weight.shape)


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, impl: str = "auto") -> Tensor:
    """x [N, in]^T @ dy [N, out] in weight's dtype, laid out as weight is, so that autograd need not copy it."""
    if _is_transposed(weight):
        return product(dy.t(), x, out_dtype=weight.dtype, impl=impl).t()
    return product(x.t(), dy, out_dtype=weight.dtype, impl=impl)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What is correct: see `linear`. Any device and floating dtype, under autograd."""
    y = x @ weight
    return y if bias is None else y + bias


define("linear(Tensor x, Tensor weight, Tensor? bias, str impl) -> Tensor")
# gelu: x is what GELU has to be taken of, with this `approximate` of F.gelu.
define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, str? gelu, bool need_dx, bool need_dweight, bool need_dbias,"
    " str impl) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


@torch.library.register_fake("gpt2_fast::linear")
def _(x, weight, bias, impl):
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.register_fake("gpt2_fast::linear_backward")
def _(dy, x, weight, gelu, need_dx, need_dweight, need_dbias, impl):
    return (
        x.new_empty(x.shape if need_dx else 0),
        empty_gradient(weight) if need_dweight else weight.new_empty(0),
        dy.new_empty(dy.shape[-1] if need_dbias else 0),
    )


@torch.library.impl("gpt2_fast::linear", ("CPU", "CUDA"))
def _(x, weight, bias, impl):
    y = product(x.reshape(-1, x.shape[-1]), weight, bias, impl=impl)
    return y.view(*x.shape[:-1], weight.shape[1])


@torch.library.impl("gpt2_fast::linear_backward", ("CPU", "CUDA"))
def _(dy, x, weight, approximate, need_dx, need_dweight, need_dbias, impl):
    dy_NO, x_NI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dweight = weight.new_empty(0)
    if need_dweight:  # before dx, so that it and a remade x are not in memory together
        dweight = weight_gradient(x_NI if approximate is None else gelu(x_NI, approximate), dy_NO, weight, impl)
    dx = product(dy_NO, weight.t(), impl=impl).view(x.shape) if need_dx else x.new_empty(0)
    dbias = _bias_gradient(dy_NO) if need_dbias else dy.new_empty(0)
    return dx, dweight, dbias


def _bias_gradient(dy: Tensor) -> Tensor:
    """dy [N, out] summed over its rows; on a GPU by Triton's kernel, which is faster than torch's sum."""
    if dy.device.type == "cuda" and dispatch.unavailable("triton", "cuda", dy.dtype) is None:
        from gpt2_fast.kernels.bias import column_sum

        return column_sum(dy.contiguous()).to(dy.dtype)
    return dy.sum(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, u, approximate, impl):
        ctx.save_for_backward(x if u is None else u, weight)
        ctx.options = (None if u is None else approximate, impl)
        return torch.ops.gpt2_fast.linear(x, weight, bias, impl)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        approximate, impl = ctx.options
        gradients = torch.ops.gpt2_fast.linear_backward(dy, x, weight, approximate, *need, impl)
        return *(g if needed else None for g, needed in zip(gradients, need, strict=True)), None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu_of: Tensor | None = None,
    approximate: str = "tanh",
    impl: str = "auto",
) -> Tensor:
    """x [..., in] @ weight [in, out] + bias [out] -> [..., out]. nn.Linear's weight [out, in] goes in as weight.t().

    gelu_of: u, if x is F.gelu(u, approximate=approximate), of x's shape and dtype. It is kept for backward in the
    place of x, so where something else keeps it anyway x takes no memory; the gradient is still that of x.
    Inside `torch.autocast` everything is cast to autocast's dtype first, as for F.linear.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    if weight.ndim != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"{OP}: x ends in {x.shape[-1]} and weight is {tuple(weight.shape)}; it must be [in, out]")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"{OP}: bias is {tuple(bias.shape)}; weight gives {weight.shape[1]} outputs")
    if gelu_of is not None and (gelu_of.shape, gelu_of.dtype, gelu_of.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"{OP}: gelu_of is {gelu_of.dtype} {tuple(gelu_of.shape)}; x is gelu of it, so it must match")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        gelu_of = gelu_of if x.dtype == dtype else None  # a cast of x is no longer gelu of it
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{OP}: {name} is {t.dtype} on {t.device} and x {x.dtype} on {x.device}; they must match")
    chosen = dispatch.choose(OP, impl, x.device, x.dtype)
    if chosen == "reference":
        return linear_reference(x, weight, bias)
    return _Linear.apply(x, weight, bias, gelu_of, approximate, "auto" if impl == "auto" else chosen)


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (x, weight, bias) that tests and benchmarks read, smallest first."""
    generator = torch.Generator().manual_seed(0)
    for shape, out, has_bias in [((1, 1, 20), 7, True), ((2, 3, 96), 288, True), ((65, 96), 33, False)]:
        x = torch.randn(shape, generator=generator)
        weight = torch.randn(shape[-1], out, generator=generator) * 0.1
        bias = torch.randn(out, generator=generator)
        yield tuple(t.to(device, dtype) if t is not None else None for t in (x, weight, bias if has_bias else None))


def cost(n_rows: int, n_in: int, n_out: int, itemsize: int) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one call with a bias, each way: every input and output once; FLOPs of the products."""
    x, weight, y, bias = (itemsize * n for n in (n_rows * n_in, n_in * n_out, n_rows * n_out, n_out))
    flops = 2 * n_rows * n_in * n_out
    return {
        "forward": {"bytes": x + weight + bias + y, "flops": flops},
        "backward": {"bytes": y + 2 * x + 2 * weight + bias, "flops": 2 * flops},
    }
