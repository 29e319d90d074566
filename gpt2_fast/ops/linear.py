"""y = x @ weight + bias with GPT-2's Conv1D weight [in, out].

    dx = dy @ weight^T          dweight = x^T @ dy          dbias = sum over rows of dy

Saved for backward: x. The products are `ops/runtime/products.py`'s.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gpt2_fast.ops.runtime.contract import FLOAT, STRIDED, Input
from gpt2_fast.ops.runtime.declare import Backend, Op, autocast
from gpt2_fast.ops.runtime.products import bias_gradient, is_transposed, product, weight_gradient


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What is correct: see `linear`. Any device and floating dtype, under autograd."""
    y = x @ weight
    return y if bias is None else y + bias


def _outputs(a):
    return {"y": ((*a.x.shape[:-1], a.O), a.x.dtype)}


def _gradients(a):
    return {
        "dx": (a.x.shape, a.x.dtype) if a.needs["x"] else None,
        "dweight": (a.weight.shape, a.weight.dtype, is_transposed(a.weight)) if a.needs["weight"] else None,
        "dbias": ((a.O,), a.dy.dtype) if a.needs["bias"] else None,
    }


def _forward(a, out, impl):
    out.y = product(a.x.view(-1, a.I), a.weight, a.bias, impl=impl).view(*a.x.shape[:-1], a.O)


def _backward(a, out, impl):
    dy, x = a.dy.view(-1, a.O), a.x.view(-1, a.I)
    if a.needs["weight"]:
        out.dweight = weight_gradient(x, dy, a.weight, impl)
    if a.needs["x"]:
        out.dx = product(dy, a.weight.t(), impl=impl).view(a.x.shape)
    if a.needs["bias"]:
        out.dbias = bias_gradient(dy)


def _products(impl: str) -> Backend:
    return Backend(functools.partial(_forward, impl=impl), functools.partial(_backward, impl=impl))


OP = Op(
    "linear",
    inputs=(Input("x", "... I", FLOAT), Input("weight", "I O", read=STRIDED), Input("bias", "O", optional=True)),
    reference=linear_reference,
    outputs=_outputs,
    output_names=("y",),
    returns=("y",),
    saved={"x": "... I", "weight": "I O"},
    gradients=_gradients,
    backends={impl: _products(impl) for impl in ("auto", "cpp", "aten")},
    on={"cpu": ("cpp", "aten"), "cuda": ("aten",)},
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x [..., in] @ weight [in, out] + bias [out] -> [..., out]. nn.Linear's weight [out, in] goes in as weight.t().

    Inside `torch.autocast` everything is cast to autocast's dtype first, as for F.linear.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    return OP(*autocast(x, weight, bias), impl=impl)


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (x, weight, bias, options) that tests and benchmarks read, smallest first."""
    generator = torch.Generator().manual_seed(0)
    for shape, out, has_bias in [((1, 1, 20), 7, True), ((2, 3, 96), 288, True), ((65, 96), 33, False)]:
        x = torch.randn(shape, generator=generator)
        weight = torch.randn(shape[-1], out, generator=generator) * 0.1
        bias = torch.randn(out, generator=generator)
        tensors = (x, weight, bias if has_bias else None)
        yield (*(t if t is None else t.to(device, dtype) for t in tensors), {})


def cost(n_rows: int, n_in: int, n_out: int, itemsize: int) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one call with a bias, each way: every input and output once; FLOPs of the products."""
    x, weight, y, bias = (itemsize * n for n in (n_rows * n_in, n_in * n_out, n_rows * n_out, n_out))
    flops = 2 * n_rows * n_in * n_out
    return {
        "forward": {"bytes": x + weight + bias + y, "flops": flops},
        "backward": {"bytes": y + 2 * x + 2 * weight + bias, "flops": 2 * flops},
    }
