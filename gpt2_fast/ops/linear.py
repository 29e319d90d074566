"""y = x @ weight + bias with GPT-2's Conv1D weight [in, out], by the vendor library that is fastest here.

    dx = dy @ weight^T          dweight = x^T @ dy          dbias = sum over rows of dy

On a GPU this is cuBLAS. On a CPU the best choice differs between processors, so `cpu_policy` makes
it from the processor's name and features, never from a timing: the same machine always gives the same bits.

* float32: MKL on Intel, oneDNN on AMD.
* bfloat16: native products where the processor has them at twice the float32 rate (AMX, or AVX-512 BF16 on
  AMD); elsewhere both sides are widened to float32, multiplied there and the result is rounded once.
* float16: always widened.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2_fast.ops import dispatch
from gpt2_fast.ops.library import define

OP = "linear"


@dataclass(frozen=True)
class CpuPolicy:
    """How products run on this CPU: the float32 library, whether bfloat16 is native, and why."""

    float32: str
    native_bfloat16: bool
    reason: str


def _cpu_vendor_and_flags() -> tuple[str, frozenset[str]]:
    vendor, flags = platform.machine(), frozenset()
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "vendor_id":
                    vendor = value.strip()
                elif key.strip() in ("flags", "Features"):
                    flags = frozenset(value.split())
                    break
    except OSError:
        pass
    return vendor, flags


@functools.cache
def cpu_policy() -> CpuPolicy:
    """The policy for this processor; GPT2_FAST_GEMM=mkl or onednn overrides the float32 library."""
    vendor, flags = _cpu_vendor_and_flags()
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    library = "onednn" if has_onednn and (vendor == "AuthenticAMD" or not torch.backends.mkl.is_available()) else "mkl"
    chosen = os.environ.get("GPT2_FAST_GEMM")
    if chosen is not None:
        if chosen not in ("mkl", "onednn"):
            raise ValueError(f"GPT2_FAST_GEMM is {chosen!r}; set it to mkl or onednn, or unset it")
        library = chosen
    amx, avx512_bf16 = "amx_bf16" in flags, "avx512_bf16" in flags
    native = amx or (avx512_bf16 and vendor == "AuthenticAMD")
    why = "AMX" if amx else "AVX-512 BF16" if native else "no bfloat16 products faster than float32"
    return CpuPolicy(library, native, f"{vendor}, {why}")


def _float32_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if cpu_policy().float32 == "onednn" and a.shape[0] > 1:
        # Computes a @ w^T for w [N, K]; a transposed view of b is what it wants.
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """a [M, K] @ b [K, N] (+ bias [N]) by the fastest vendor product; either side may be a transposed view.

    Args:
        a, b, bias: one dtype and device.
        out_dtype: a's unless given; float32 keeps what a widened product has before rounding.
    """
    out_dtype = out_dtype or a.dtype
    if a.device.type != "cpu":
        result = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    elif a.dtype == torch.float32:
        result = _float32_product(a, b, bias)
    elif a.dtype == torch.bfloat16 and cpu_policy().native_bfloat16:
        result = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    else:
        result = _float32_product(a.float(), b.float(), None if bias is None else bias.float())
    return result.to(out_dtype)


def _is_transposed(weight: Tensor) -> bool:
    """Whether weight [in, out] is a view of nn.Linear's [out, in]."""
    return weight.t().is_contiguous() and not weight.is_contiguous()


def empty_gradient(weight: Tensor) -> Tensor:
    """Uninitialised, with the strides of `weight_gradient`'s result."""
    if _is_transposed(weight):
        return weight.new_empty(weight.shape[::-1]).t()
    return weight.new_empty(weight.shape)


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """x [N, in]^T @ dy [N, out] in weight's dtype, laid out as weight is, so that autograd need not copy it."""
    if _is_transposed(weight):
        return product(dy.t(), x, out_dtype=weight.dtype).t()
    return product(x.t(), dy, out_dtype=weight.dtype)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What is correct: see `linear`. Any device and floating dtype, under autograd."""
    y = x @ weight
    return y if bias is None else y + bias


define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dweight, bool need_dbias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


@torch.library.register_fake("gpt2_fast::linear")
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.register_fake("gpt2_fast::linear_backward")
def _(dy, x, weight, need_dx, need_dweight, need_dbias):
    return (
        x.new_empty(x.shape if need_dx else 0),
        empty_gradient(weight) if need_dweight else weight.new_empty(0),
        dy.new_empty(dy.shape[-1] if need_dbias else 0),
    )


@torch.library.impl("gpt2_fast::linear", ("CPU", "CUDA"))
def _(x, weight, bias):
    y = product(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[1])


@torch.library.impl("gpt2_fast::linear_backward", ("CPU", "CUDA"))
def _(dy, x, weight, need_dx, need_dweight, need_dbias):
    dy_NO, x_NI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = product(dy_NO, weight.t()).view(x.shape) if need_dx else x.new_empty(0)
    dweight = weight_gradient(x_NI, dy_NO, weight) if need_dweight else weight.new_empty(0)
    dbias = dy_NO.sum(0) if need_dbias else dy.new_empty(0)
    return dx, dweight, dbias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.gpt2_fast.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need = ctx.needs_input_grad
        gradients = torch.ops.gpt2_fast.linear_backward(dy, x, weight, *need)
        return tuple(g if needed else None for g, needed in zip(gradients, need, strict=True))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x [..., in] @ weight [in, out] + bias [out] -> [..., out]. nn.Linear's weight [out, in] goes in as weight.t().

    Inside `torch.autocast` everything is cast to autocast's dtype first, as for F.linear.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    if weight.ndim != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"{OP}: x ends in {x.shape[-1]} and weight is {tuple(weight.shape)}; it must be [in, out]")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"{OP}: bias is {tuple(bias.shape)}; weight gives {weight.shape[1]} outputs")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{OP}: {name} is {t.dtype} on {t.device} and x {x.dtype} on {x.device}; they must match")
    if dispatch.choose(OP, impl, x.device, x.dtype) == "reference":
        return linear_reference(x, weight, bias)
    return _Linear.apply(x, weight, bias)


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
