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

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_fast.ops.runtime import buffers, dispatch, philox
from gpt2_fast.ops.runtime.dispatch import DTYPE_CODES, address
from gpt2_fast.ops.runtime.library import define

OP = "add_layernorm"
PARTIAL_CHUNKS = 64  # of rows, each summed alone and then in order: the same bits on any number of threads


def add_layernorm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """What is correct: see `add_layernorm`. Any device and floating dtype, under autograd."""
    x_NC = x.reshape(-1, x.shape[-1])
    h = philox.dropout_rows(x_NC, dropout_p, rng, site).view(x.shape)
    h = h if residual is None else residual + h
    # F.layer_norm wants one dtype; a lower-precision weight is exact in h's.
    return F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype), eps), h


define(
    "add_layernorm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, float dropout_p, Tensor? rng,"
    " int site, ScalarType y_dtype, str impl) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)"
)
define(
    "add_layernorm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor mean, Tensor rstd,"
    " float dropout_p, Tensor? rng, int site, ScalarType x_dtype, bool has_residual, str impl)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)


def _empty_forward(x, residual, y_dtype):
    """Outputs of the forward pass; h is empty where it would be x itself."""
    n_rows = x.numel() // x.shape[-1]
    h = x.new_empty(0) if residual is None else torch.empty_like(residual)
    stats = x.new_empty(n_rows, dtype=torch.float32)
    return torch.empty_like(x, dtype=y_dtype), h, stats, torch.empty_like(stats)


def _empty_backward(dy, h, dropout_p, x_dtype, has_residual):
    """Gradients; dx is empty where it would be dresidual itself (no dropout between them, same dtype)."""
    separate = has_residual and (dropout_p > 0.0 or x_dtype != h.dtype)
    dx = torch.empty_like(h, dtype=x_dtype) if separate else h.new_empty(0, dtype=x_dtype)
    dweight = h.new_empty(h.shape[-1], dtype=torch.float32)
    return dx, torch.empty_like(h), dweight, torch.empty_like(dweight)


@torch.library.register_fake("gpt2_fast::add_layernorm")
def _(x, residual, weight, bias, eps, dropout_p, rng, site, y_dtype, impl):
    return _empty_forward(x, residual, y_dtype)


@torch.library.register_fake("gpt2_fast::add_layernorm_backward")
def _(dy, dh, h, weight, mean, rstd, dropout_p, rng, site, x_dtype, has_residual, impl):
    return _empty_backward(dy, h, dropout_p, x_dtype, has_residual)


def _forward_cpp(x, residual, weight, bias, eps, dropout_p, rng, site, y_dtype):
    n_embd, n_rows = x.shape[-1], x.numel() // x.shape[-1]
    y = buffers.empty(x, x.shape, y_dtype)
    h = x.new_empty(0) if residual is None else buffers.empty(residual, x.shape, residual.dtype)
    mean, rstd = (x.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
    dispatch.extension().add_layernorm_forward(
        address(x), address(residual), address(weight), address(bias),
        address(y), address(None if residual is None else h), address(mean), address(rstd),
        n_rows, n_embd, eps,
        DTYPE_CODES[x.dtype], DTYPE_CODES[x.dtype if residual is None else residual.dtype], DTYPE_CODES[y_dtype],
        *philox.arguments(dropout_p, rng, site),
    )  # fmt: skip
    return y, h, mean, rstd


def _backward_cpp(dy, dh, h, weight, mean, rstd, dropout_p, rng, site, x_dtype, has_residual):
    n_embd = h.shape[-1]
    separate = has_residual and (dropout_p > 0.0 or x_dtype != h.dtype)
    dx = buffers.empty(h, h.shape, x_dtype) if separate else h.new_empty(0, dtype=x_dtype)
    dresidual = buffers.empty(h, h.shape, h.dtype)
    dweight, dbias = (h.new_empty(n_embd, dtype=torch.float32) for _ in range(2))
    n_rows = h.numel() // n_embd
    chunks = min(n_rows, PARTIAL_CHUNKS)
    partial = h.new_empty(chunks, 2, n_embd, dtype=torch.float32)
    dispatch.extension().add_layernorm_backward(
        address(dy), address(dh), address(h), address(weight), address(mean), address(rstd),
        address(dx if dx.numel() else None), address(dresidual), address(partial), chunks,
        address(dweight), address(dbias), n_rows, n_embd,
        DTYPE_CODES[x_dtype], DTYPE_CODES[h.dtype], DTYPE_CODES[dy.dtype],
        *philox.arguments(dropout_p, rng, site),
    )  # fmt: skip
    return dx, dresidual, dweight, dbias


def normalized(h: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """y again, [..., C] in `dtype`, to the bits of the C++ forward, from what it saved: h and float32 [N] statistics.

    weight, bias: [C]. All on the CPU and contiguous.
    """
    y, n_embd = buffers.empty(h, h.shape, dtype), h.shape[-1]
    weight, bias = weight.float(), bias.float()
    dispatch.extension().add_layernorm_normalize(
        address(h), address(weight), address(bias), address(mean), address(rstd), address(y),
        h.numel() // n_embd, n_embd, DTYPE_CODES[h.dtype], DTYPE_CODES[dtype],
    )  # fmt: skip
    return y


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.view(-1, t.shape[-1])


def _forward_triton(x, residual, weight, bias, eps, dropout_p, rng, site, y_dtype):
    from gpt2_fast.kernels import add_layernorm as kernel

    y, h, mean, rstd = kernel.forward(
        _rows(x), _rows(residual), weight, bias, eps, dropout_p, rng, site, y_dtype
    )  # fmt: skip
    return y.view(x.shape), x.new_empty(0) if residual is None else h.view(x.shape), mean, rstd


def _backward_triton(dy, dh, h, weight, mean, rstd, dropout_p, rng, site, x_dtype, has_residual):
    from gpt2_fast.kernels import add_layernorm as kernel

    dx, dresidual, dweight, dbias = kernel.backward(
        _rows(dy), _rows(dh), _rows(h), weight, mean, rstd, dropout_p, rng, site, x_dtype, has_residual
    )
    dx = h.new_empty(0, dtype=x_dtype) if dx is None else dx.view(h.shape)
    return dx, dresidual.view(h.shape), dweight, dbias


_FORWARD = {"cpp": _forward_cpp, "triton": _forward_triton}
_BACKWARD = {"cpp": _backward_cpp, "triton": _backward_triton}


@torch.library.impl("gpt2_fast::add_layernorm", ("CPU", "CUDA"))
def _(x, residual, weight, bias, eps, dropout_p, rng, site, y_dtype, impl):
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    return _FORWARD[impl](x, residual, weight.float(), bias.float(), eps, dropout_p, rng, site, y_dtype)


@torch.library.impl("gpt2_fast::add_layernorm_backward", ("CPU", "CUDA"))
def _(dy, dh, h, weight, mean, rstd, dropout_p, rng, site, x_dtype, has_residual, impl):
    dy, dh = dy.contiguous(), None if dh is None else dh.to(h.dtype).contiguous()
    return _BACKWARD[impl](dy, dh, h, weight.float(), mean, rstd, dropout_p, rng, site, x_dtype, has_residual)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, dropout_p, rng, site, y_dtype, impl):
        y, h, mean, rstd = torch.ops.gpt2_fast.add_layernorm(
            x, residual, weight, bias, eps, dropout_p, rng, site, y_dtype, impl
        )
        ctx.save_for_backward(x.contiguous() if residual is None else h, weight, mean, rstd, rng)
        ctx.options = (dropout_p, site, x.dtype, residual is not None, bias.dtype, impl)
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx, dy, dh):
        h, weight, mean, rstd, rng = ctx.saved_tensors
        dropout_p, site, x_dtype, has_residual, bias_dtype, impl = ctx.options
        dy = torch.zeros_like(h) if dy is None else dy
        dx, dresidual, dweight, dbias = torch.ops.gpt2_fast.add_layernorm_backward(
            dy, dh if has_residual else None, h, weight, mean, rstd, dropout_p, rng, site, x_dtype, has_residual, impl
        )
        dx = dx if dx.numel() else dresidual
        dresidual = dresidual if has_residual else None
        return dx, dresidual, dweight.to(weight.dtype), dbias.to(bias_dtype), *(None,) * 6


def _validate(x, residual, weight, bias, dropout_p, rng):
    n_embd = x.shape[-1]
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{OP}: residual is {tuple(residual.shape)} and x is {tuple(x.shape)}; they must match")
    for name, t in (("weight", weight), ("bias", bias)):
        if t.shape != (n_embd,):
            raise ValueError(f"{OP}: {name} is {tuple(t.shape)}; x ends in {n_embd}, so it must be ({n_embd},)")
    for name, t in (("residual", residual), ("weight", weight), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{OP}: {name} is on {t.device} and x on {x.device}; move them to one device")
    if residual is not None and residual.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{OP}: residual is {residual.dtype} and x {x.dtype}; residual must be float32 or x's dtype")
    if residual is None and dropout_p > 0.0:
        raise ValueError(f"{OP}: dropout_p is {dropout_p} and residual is None; dropout acts on what is added")
    philox.check(OP, dropout_p, rng, x.device)


def add_layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dropout, residual add and LayerNorm in one pass.

    Args:
        x: [..., C], what is added to the stream; or, with no residual, the stream itself.
        residual: [..., C] or None. May be float32 beside a lower-precision x.
        weight, bias: [C].
        eps: added to the variance.
        dropout_p: probability of zeroing an element of x before the add; 0 in eval mode.
        rng: int64 [1] key of this forward pass (`philox.new_key`), needed when dropout_p > 0.
        site: which dropout of the model this is; each site draws its own mask from the key.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        y [..., C] in x's dtype (in autocast's inside `torch.autocast`), and h [..., C] in residual's dtype; h is x
        when there is no residual.

    Raises:
        ValueError: shapes, devices or dropout_p that do not fit.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    _validate(x, residual, weight, bias, dropout_p, rng)
    y_dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        y_dtype = torch.get_autocast_dtype(x.device.type)
    name = dispatch.choose(OP, impl, x.device, x.dtype)
    if name == "reference":
        y, h = add_layernorm_reference(x, residual, weight, bias, eps=eps, dropout_p=dropout_p, rng=rng, site=site)
        return y.to(y_dtype), h
    y, h = _AddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p, rng, site, y_dtype, name)
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
        rng = torch.tensor([0x1234_5678_9ABC_DEF0], device=device) if dropout_p else None
        if not has_residual:
            tensors[1] = None
        yield (*tensors, {"dropout_p": dropout_p, "rng": rng, "site": 3})


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
