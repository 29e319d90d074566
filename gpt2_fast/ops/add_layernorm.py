"""h = residual + dropout(x); y = LayerNorm(h): the seam between two halves of a GPT-2 block, in one pass.

    mean = sum(h) / C        rstd = 1 / sqrt(sum((h - mean)^2) / C + eps)
    y    = (h - mean) * rstd * weight + bias

Backward, with n = (h - mean) * rstd and g = dy * weight (Ba, Kiros, Hinton 2016, arXiv:1607.06450):

    dresidual = dh + rstd * (g - sum(g) / C - n * sum(g * n) / C)        dx = dropout'(dresidual)
    dweight   = sum over rows of dy * n                                  dbias = sum over rows of dy

Saved for backward: h, and mean and rstd in float32, two numbers a row; n and the dropout mask are computed
again. torch runs this as dropout, add and layer_norm: three passes forward, and saves x's mask as well.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_fast.ops.runtime import buffers, cpp
from gpt2_fast.ops.runtime.contract import FLOAT, FLOATS, STREAM, Input
from gpt2_fast.ops.runtime.declare import Backend, Op, autocast_dtype
from gpt2_fast.ops.runtime.dispatch import LOW_PRECISION
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout, check_addition

PARTIAL_CHUNKS = 64  # of rows, each summed alone and then in order: the same bits on any number of threads


def add_layernorm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout: Dropout = NO_DROPOUT,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """What is correct: see `add_layernorm`. Any device and floating dtype, under autograd."""
    h = dropout.rows(x)
    h = h if residual is None else residual + h
    # F.layer_norm wants one dtype; a lower-precision weight is exact in h's.
    y = F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype), eps)
    return y.to(y_dtype or x.dtype), h


def _outputs(a):
    """h only where something is added to the stream: otherwise it is x."""
    h = None if a.residual is None else (a.x.shape, a.residual.dtype)
    return {"y": (a.x.shape, a.y_dtype), "h": h, "mean": ((a.N,), torch.float32), "rstd": ((a.N,), torch.float32)}


def _gradients(a):
    """dx only where it is not dresidual itself: with dropout between them, or in another dtype. Triton's sums are
    rounded as they are stored; C++ has them in float32."""
    separate = a.has_residual and (a.dropout.p > 0.0 or a.x_dtype != a.h.dtype)
    of_parameters = ((a.C,), a.weight.dtype if a.impl == "triton" else torch.float32)
    return {
        "dx": (a.h.shape, a.x_dtype) if separate else None,
        "dresidual": (a.h.shape, a.h.dtype),
        "dweight": of_parameters,
        "dbias": of_parameters,
    }


def _written(x_dtype: torch.dtype, y_dtype: torch.dtype) -> torch.dtype:
    """What the C++ kernels have y in: beside one low precision they know no other, which is rounded to afterwards."""
    return torch.float32 if {x_dtype, y_dtype} == set(LOW_PRECISION) else y_dtype


def _forward_cpp(a, out):
    a.weight, a.bias = a.weight.float(), a.bias.float()
    y = out.y = buffers.empty(a.x, a.x.shape, _written(a.x.dtype, a.y_dtype))
    h_dtype = (a.x if a.residual is None else a.residual).dtype
    cpp.add_layernorm_forward(out, a, h_dtype=h_dtype, y_dtype=y.dtype)
    out.y = y if y.dtype is a.y_dtype else y.to(a.y_dtype)


def _backward_cpp(a, out):
    a.weight = a.weight.float()
    a.dy = a.dy.to(_written(a.x_dtype, a.dy.dtype))
    chunks = min(a.N, PARTIAL_CHUNKS)
    partial = a.h.new_empty(chunks, 2, a.C, dtype=torch.float32)
    cpp.add_layernorm_backward(out, a, chunks=chunks, partial=partial)


def normalized(h: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """y again, [..., C] in `dtype`, to the bits of the C++ forward, from h and the float32 [N] statistics it saved."""
    y, weight, bias = (
        buffers.empty(h, h.shape, _written(h.dtype, dtype)),
        *(t.float().contiguous() for t in (weight, bias)),
    )
    cpp.add_layernorm_normalize(h=h, weight=weight, bias=bias, mean=mean, rstd=rstd, y=y, N=len(mean), C=h.shape[-1])
    return y.to(dtype)


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.view(-1, t.shape[-1])


def _forward_triton(a, out):
    from gpt2_fast.kernels import add_layernorm as kernel

    y, h, out.mean, out.rstd = kernel.forward(
        _rows(a.x), _rows(a.residual), a.weight, a.bias, a.eps, *a.dropout, a.y_dtype
    )
    out.y, out.h = y.view(a.x.shape), None if h is None else h.view(a.x.shape)


def _backward_triton(a, out):
    from gpt2_fast.kernels import add_layernorm as kernel

    dx, dresidual, out.dweight, out.dbias = kernel.backward(
        _rows(a.dy), _rows(a.dh), _rows(a.h), a.weight, a.mean, a.rstd, *a.dropout, a.x_dtype, a.has_residual,
        a.weight.dtype,
    )  # fmt: skip
    out.dx, out.dresidual = None if dx is None else dx.view(a.h.shape), dresidual.view(a.h.shape)


def check_eps(op: str, **eps: float) -> None:
    """Raises ValueError for what cannot be added to a variance, which would be a NaN in some rows alone."""
    for name, value in eps.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{op}: {name} is {value}; it must be at least 0 and finite")


def _check(x, residual, *_, eps, dropout, **__):
    check_eps("add_layernorm", eps=eps)
    check_addition("add_layernorm", residual, dropout)


OP = Op(
    "add_layernorm",
    inputs=(
        Input("x", "... C", FLOAT),
        Input("residual", "... C", STREAM, optional=True),
        Input("weight", "C", FLOAT),
        Input("bias", "C", FLOAT),
    ),
    options={"eps": float, "dropout": Dropout, "y_dtype": torch.dtype},
    check=_check,
    reference=add_layernorm_reference,
    outputs=_outputs,
    output_names=("y", "h", "mean", "rstd"),
    returns=("y", "h"),
    saved={"h|x": "... C", "weight": "C", "mean": "N", "rstd": "N"},
    carry={"x_dtype": (torch.dtype, lambda a: a.x.dtype), "has_residual": (bool, lambda a: a.residual is not None)},
    gradients=_gradients,
    alias={"x": "residual"},
    backends={"cpp": Backend(_forward_cpp, _backward_cpp), "triton": Backend(_forward_triton, _backward_triton)},
    on={"cpu": ("cpp",), "cuda": ("triton",)},
)


def of_one_dtype(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Their gradients are stored in one dtype: no lower one than either's."""
    floats = isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.dtype in FLOATS and bias.dtype in FLOATS
    if not floats or weight.dtype is bias.dtype:
        return weight, bias
    dtype = torch.promote_types(weight.dtype, bias.dtype)
    return weight.to(dtype), bias.to(dtype)


def add_layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout: Dropout = NO_DROPOUT,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dropout, residual add and LayerNorm in one pass.

    Args:
        x: [..., C], what is added to the stream; or, with no residual, the stream itself.
        residual: [..., C] or None. May be float32 beside a lower-precision x.
        weight, bias: [C].
        eps: added to the variance.
        dropout: of x before the add.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        y [..., C] in x's dtype (in autocast's inside `torch.autocast`), and h [..., C] in residual's dtype; h is x
        when there is no residual.

    Raises:
        ValueError: shapes, dtypes, devices, eps or dropout that do not fit.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    weight, bias = of_one_dtype(weight, bias)
    y, h = OP(x, residual, weight, bias, eps=eps, dropout=dropout, y_dtype=autocast_dtype(x), impl=impl)
    return y, x if residual is None else h


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (x, residual, weight, bias, options) that tests and benchmarks read, smallest first."""
    generator = torch.Generator().manual_seed(0)
    for shape, dropout_p, has_residual in [
        ((1, 1, 20), 0.0, True), ((3, 96), 0.0, False), ((2, 33, 96), 0.1, True), ((1, 65, 768), 0.0, True),
    ]:  # fmt: skip
        x, residual = (torch.randn(shape, generator=generator) for _ in range(2))
        weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
        tensors = [t.to(device, dtype) for t in (x, residual, weight + 1.0, bias)]
        key = torch.tensor([0x1234_5678_9ABC_DEF0], device=device) if dropout_p else None
        if not has_residual:
            tensors[1] = None
        yield (*tensors, {"dropout": Dropout(dropout_p, key, 3)})


def cost(n_rows: int, n_embd: int, itemsize: int, residual: bool = True) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one call, each way: what a roofline divides by.

    Every input and output is counted once: rows and parameters of `itemsize` bytes, the row statistics in float32.
    Without a residual nothing is added, and h is x.
    """
    rows, params, stats = itemsize * n_rows * n_embd, itemsize * 2 * n_embd, 8 * n_rows
    passes, added = (4, 1) if residual else (2, 0)
    return {
        "forward": {"bytes": passes * rows + params + stats, "flops": (7 + added) * n_rows * n_embd},
        "backward": {"bytes": (3 + added) * rows + params * 3 // 2 + stats, "flops": (13 + added) * n_rows * n_embd},
    }
