"""The two kinds of GELU, by one name everywhere: Python, C++ (``erf``) and Triton."""

from __future__ import annotations

import enum

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_fast.ops.runtime import buffers, cpp, dispatch


class Gelu(enum.IntEnum):
    """TANH: 0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))), GPT-2's. ERF: u Phi(u), GELU itself.

    Hendrycks, Gimpel 2016, arXiv:1606.08415.
    """

    TANH = 0
    ERF = 1

    @property
    def approximate(self) -> str:
        """The word that F.gelu has for it."""
        return "none" if self else "tanh"


# transformers' names of them, in config.activation_function.
ACTIVATIONS = {"gelu_new": Gelu.TANH, "gelu_pytorch_tanh": Gelu.TANH, "gelu": Gelu.ERF}


def kind_of(op: str, activation: str) -> Gelu:
    """The kind that config.activation_function names; raises ValueError for another function."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; choose {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


def gelu(u: Tensor, kind: Gelu) -> Tensor:
    """GELU of u [N, F], in u's dtype; on a CPU to the bits that the fused product gave for u."""
    if not u.is_cpu or dispatch.unavailable("cpp", "cpu", u.dtype) is not None:
        return F.gelu(u, approximate=Gelu(kind).approximate)
    u, (N, width) = u.contiguous(), u.shape
    y = buffers.empty(u, u.shape, u.dtype)
    cpp.gelu(u=u, y=y, N=N, F=width, erf=kind)
    return y


def bias_gelu(
    product: Tensor, bias: Tensor, dtype: torch.dtype, save: bool, kind: Gelu
) -> tuple[Tensor, Tensor | None]:
    """y = gelu(u) and, when `save`, u = product [N, F] + bias, on a CPU; whichever can overwrites the product."""
    N, width = product.shape
    reuse = product.dtype == dtype
    u = (product if reuse else torch.empty_like(product, dtype=dtype)) if save else None
    y = product if reuse and not save else torch.empty_like(product, dtype=dtype)
    cpp.bias_gelu_forward(product=product, bias=bias.float().contiguous(), u=u, y=y, N=N, F=width, erf=kind)
    return y, u


PARTIAL_CHUNKS = 64  # of rows, each summed alone and then in order: the same bits on any number of threads


def bias_gelu_backward(dy: Tensor, u: Tensor, dtype: torch.dtype, kind: Gelu) -> tuple[Tensor, Tensor]:
    """du = dy * gelu'(u) [N, F] in `dtype`, and dbias [F] float32, on a CPU."""
    N, width = u.shape
    chunks = min(N, PARTIAL_CHUNKS)
    du = buffers.empty(u, (N, width), dtype)
    partial = u.new_empty(chunks, width, dtype=torch.float32)
    dbias = u.new_empty(width, dtype=torch.float32)
    cpp.bias_gelu_backward(dy=dy, u=u, du=du, partial=partial, chunks=chunks, dbias=dbias, N=N, F=width, erf=kind)
    return du, dbias
