"""h = residual + dropout(x); y = gelu(LayerNorm(h) @ weight + bias): the first half of GPT-2's MLP.

    n = (h - mean) * rstd * ln_weight + ln_bias      u = n @ weight + bias      y = gelu(u), see ACTIVATIONS

Backward, then that of add_layernorm from dn:

    du = dy * gelu'(u)     dbias = sum over rows of du     dweight = n^T @ du     dn = du @ weight^T

Saved for backward: h, u and the row statistics; n is made again. torch keeps h, n, u, y and the dropout mask, and
takes seven passes around the product where there are two here. On a GPU up to 64 rows are normalised tile by tile
inside Triton's product, so n is never written; more are normalised in a pass, as the vendor's product is faster. On
a CPU n is float32 wherever the product is (see `cpu_policy`), which takes GELU before it stores where it is this
package's own (see `linear`); around the vendor's, the pass that adds the bias does both.

The product after this one would keep y, as large as u. With `return_u` u comes out beside y, for `linear` to keep in
its place (`gelu_of`): no more memory, for one pass over it in backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_fast.ops.add_layernorm import add_layernorm_reference, normalized
from gpt2_fast.ops.linear import empty_gradient, gelu_product, product, takes_own_product, weight_gradient
from gpt2_fast.ops.runtime import buffers, dispatch, philox
from gpt2_fast.ops.runtime.cpu_policy import cpu_policy
from gpt2_fast.ops.runtime.dispatch import DTYPE_CODES, address
from gpt2_fast.ops.runtime.library import define

OP = "layernorm_linear_gelu"
# transformers' names of GELU, and F.gelu's `approximate`: GPT-2's tanh by two names, and GELU itself, by erf.
ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
PARTIAL_CHUNKS = 64  # of rows, each summed alone and then in order: the same bits on any number of threads


def layernorm_linear_gelu_reference(
    x: Tensor,
    residual: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    activation: str = "gelu_new",
) -> tuple[Tensor, Tensor]:
    """What is correct: see `layernorm_linear_gelu`. Any device and floating dtype, under autograd."""
    n, h = add_layernorm_reference(
        x, residual, ln_weight, ln_bias, eps=eps, dropout_p=dropout_p, rng=rng, site=site
    )  # fmt: skip
    return F.gelu(n.to(weight.dtype) @ weight + bias, approximate=ACTIVATIONS[activation]), h


# erf: GELU itself, else by tanh. save: keep u for backward. An output that is not needed (h without a residual, u) is
# empty.
define(
    "layernorm_linear_gelu(Tensor x, Tensor? residual, Tensor ln_weight, Tensor ln_bias, Tensor weight, Tensor bias,"
    " float eps, float dropout_p, Tensor? rng, int site, bool erf, bool save, str impl)"
    " -> (Tensor y, Tensor h, Tensor u, Tensor mean, Tensor rstd)"
)
define(
    "layernorm_linear_gelu_backward(Tensor dy, Tensor? dh, Tensor h, Tensor u, Tensor mean, Tensor rstd,"
    " Tensor ln_weight, Tensor ln_bias, Tensor weight, float dropout_p, Tensor? rng, int site, bool erf,"
    " ScalarType x_dtype, bool has_residual, str impl)"
    " -> (Tensor dx, Tensor dresidual, Tensor dln_weight, Tensor dln_bias, Tensor dweight, Tensor dbias)"
)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU multiplies matrices of `dtype`."""
    native = dtype == torch.bfloat16 and cpu_policy().native_bfloat16
    return torch.bfloat16 if native else torch.float32


@torch.library.register_fake("gpt2_fast::layernorm_linear_gelu")
def _(x, residual, ln_weight, ln_bias, weight, bias, eps, dropout_p, rng, site, erf, save, impl):
    y = weight.new_empty(*x.shape[:-1], weight.shape[1])
    h = x.new_empty(0) if residual is None else torch.empty_like(residual)
    u = y.new_empty(y.shape if save else 0)
    stats = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return y, h, u, stats, torch.empty_like(stats)


@torch.library.register_fake("gpt2_fast::layernorm_linear_gelu_backward")
def _(dy, dh, h, u, mean, rstd, ln_weight, ln_bias, weight, dropout_p, rng, site, erf, x_dtype, has_residual, impl):
    separate = has_residual and (dropout_p > 0.0 or x_dtype != h.dtype)
    dx = torch.empty_like(h, dtype=x_dtype) if separate else h.new_empty(0, dtype=x_dtype)
    dln = h.new_empty(h.shape[-1], dtype=torch.float32)
    dbias = h.new_empty(weight.shape[1], dtype=torch.float32)
    return dx, torch.empty_like(h), dln, torch.empty_like(dln), empty_gradient(weight), dbias


def _bias_gelu(product_NF: Tensor, bias: Tensor, dtype: torch.dtype, save: bool, erf: bool) -> tuple[Tensor, Tensor]:
    """y = gelu(u) and, when `save`, u = product + bias; whichever can overwrites the product."""
    n_rows, width = product_NF.shape
    reuse = product_NF.dtype == dtype
    u = (product_NF if reuse else torch.empty_like(product_NF, dtype=dtype)) if save else None
    y = product_NF if reuse and not save else torch.empty_like(product_NF, dtype=dtype)
    dispatch.extension().bias_gelu_forward(
        address(product_NF), address(bias), address(u), address(y),
        n_rows, width, DTYPE_CODES[product_NF.dtype], DTYPE_CODES[dtype], erf,
    )  # fmt: skip
    return y, product_NF.new_empty(0, dtype=dtype) if u is None else u


def _forward_cpp(x, residual, ln_weight, ln_bias, weight, bias, eps, dropout_p, rng, site, erf, save):
    wide = _product_dtype(weight.dtype)
    n, h, mean, rstd = torch.ops.gpt2_fast.add_layernorm(
        x, residual, ln_weight, ln_bias, eps, dropout_p, rng, site, wide, "cpp"
    )
    n_NC, shape = n.view(-1, n.shape[-1]), (*x.shape[:-1], weight.shape[1])
    if takes_own_product(n_NC, weight):
        y, u = gelu_product(n_NC, weight, bias, weight.dtype, save, erf)
        u = y.new_empty(0) if u is None else u
    else:
        y, u = _bias_gelu(product(n_NC, weight.to(wide)), bias.float(), weight.dtype, save, erf)
    return y.view(shape), h, u.view(shape) if save else u, mean, rstd


def _bias_gelu_backward(dy: Tensor, u: Tensor, dtype: torch.dtype, erf: bool) -> tuple[Tensor, Tensor]:
    """du [N, F] in `dtype`, and dbias [F] float32."""
    width = u.shape[-1]
    n_rows = u.numel() // width
    chunks = max(1, min(n_rows, PARTIAL_CHUNKS))
    du = buffers.empty(u, (n_rows, width), dtype)
    partial = u.new_empty(chunks, width, dtype=torch.float32)
    dbias = u.new_empty(width, dtype=torch.float32)
    dispatch.extension().bias_gelu_backward(
        address(dy), address(u), address(du), address(partial), chunks, address(dbias),
        n_rows, width, DTYPE_CODES[dtype], DTYPE_CODES[u.dtype], erf,
    )  # fmt: skip
    return du, dbias


def _backward_cpp(
    dy, dh, h, u, mean, rstd, ln_weight, ln_bias, weight, dropout_p, rng, site, erf, x_dtype, has_residual
):
    wide = _product_dtype(weight.dtype)
    du, dbias = _bias_gelu_backward(dy, u, wide, erf)
    n_NC = normalized(h, ln_weight, ln_bias, mean, rstd, wide).view(-1, h.shape[-1])
    dweight = weight_gradient(n_NC, du, weight)
    del n_NC  # before dn, which is as large
    dn = product(du, weight.t()).view(h.shape)
    dx, dresidual, dln_weight, dln_bias = torch.ops.gpt2_fast.add_layernorm_backward(
        dn, dh, h, ln_weight, mean, rstd, dropout_p, rng, site, x_dtype, has_residual, "cpp"
    )
    return dx, dresidual, dln_weight, dln_bias, dweight, dbias


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.view(-1, t.shape[-1])


def _forward_triton(x, residual, ln_weight, ln_bias, weight, bias, eps, dropout_p, rng, site, erf, save):
    from gpt2_fast.kernels import layernorm_linear_gelu as kernel

    y, h, u, mean, rstd = kernel.forward(
        _rows(x), _rows(residual), ln_weight, ln_bias, weight, bias, eps, dropout_p, rng, site, erf,
        weight.dtype,
    )  # fmt: skip
    shape = (*x.shape[:-1], weight.shape[1])
    h = x.new_empty(0) if residual is None else h.view(x.shape)
    return y.view(shape), h, u.view(shape) if save else u.new_empty(0), mean, rstd


def _backward_triton(
    dy, dh, h, u, mean, rstd, ln_weight, ln_bias, weight, dropout_p, rng, site, erf, x_dtype, has_residual
):
    from gpt2_fast.kernels import layernorm_linear_gelu as kernel

    dx, dresidual, dln_weight, dln_bias, dweight, dbias = kernel.backward(
        _rows(dy), _rows(dh), _rows(h), _rows(u), mean, rstd, ln_weight, ln_bias, weight,
        dropout_p, rng, site, erf, x_dtype, has_residual,
    )  # fmt: skip
    dx = h.new_empty(0, dtype=x_dtype) if dx is None else dx.view(h.shape)
    return dx, dresidual.view(h.shape), dln_weight, dln_bias, dweight, dbias


_FORWARD = {"cpp": _forward_cpp, "triton": _forward_triton}
_BACKWARD = {"cpp": _backward_cpp, "triton": _backward_triton}


@torch.library.impl("gpt2_fast::layernorm_linear_gelu", ("CPU", "CUDA"))
def _(x, residual, ln_weight, ln_bias, weight, bias, eps, dropout_p, rng, site, erf, save, impl):
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    return _FORWARD[impl](
        x, residual, ln_weight.contiguous(), ln_bias.contiguous(), weight, bias.contiguous(),
        eps, dropout_p, rng, site, erf, save,
    )  # fmt: skip


@torch.library.impl("gpt2_fast::layernorm_linear_gelu_backward", ("CPU", "CUDA"))
def _(dy, dh, h, u, mean, rstd, ln_weight, ln_bias, weight, dropout_p, rng, site, erf, x_dtype, has_residual, impl):
    dy, dh = dy.contiguous(), None if dh is None else dh.to(h.dtype).contiguous()
    return _BACKWARD[impl](
        dy, dh, h, u, mean, rstd, ln_weight.contiguous(), ln_bias.contiguous(), weight,
        dropout_p, rng, site, erf, x_dtype, has_residual,
    )  # fmt: skip


class _LayerNormLinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, ln_weight, ln_bias, weight, bias, eps, dropout_p, rng, site, erf, impl):
        y, h, u, mean, rstd = torch.ops.gpt2_fast.layernorm_linear_gelu(
            x, residual, ln_weight, ln_bias, weight, bias, eps, dropout_p, rng, site, erf, True, impl
        )
        saved_h = x.contiguous() if residual is None else h
        ctx.mark_non_differentiable(u)
        ctx.save_for_backward(saved_h, u, mean, rstd, ln_weight, ln_bias, weight, rng)
        ctx.options = (dropout_p, site, erf, x.dtype, residual is not None, bias.dtype, impl)
        ctx.set_materialize_grads(False)
        return y, h, u

    @staticmethod
    def backward(ctx, dy, dh, _):
        h, u, mean, rstd, ln_weight, ln_bias, weight, rng = ctx.saved_tensors
        dropout_p, site, erf, x_dtype, has_residual, bias_dtype, impl = ctx.options
        dx, dresidual, dln_weight, dln_bias, dweight, dbias = torch.ops.gpt2_fast.layernorm_linear_gelu_backward(
            torch.zeros_like(u) if dy is None else dy, dh if has_residual else None, h, u, mean, rstd,
            ln_weight, ln_bias, weight, dropout_p, rng, site, erf, x_dtype, has_residual, impl,
        )  # fmt: skip
        dx = dx if dx.numel() else dresidual
        dresidual = dresidual if has_residual else None
        dln = (dln_weight.to(ln_weight.dtype), dln_bias.to(ln_bias.dtype))
        return dx, dresidual, *dln, dweight, dbias.to(bias_dtype), *(None,) * 6


def _validate(x, residual, ln_weight, ln_bias, weight, bias, dropout_p, rng, activation):
    n_embd = x.shape[-1]
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{OP}: residual is {tuple(residual.shape)} and x is {tuple(x.shape)}; they must match")
    for name, t in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if t.shape != (n_embd,):
            raise ValueError(f"{OP}: {name} is {tuple(t.shape)}; x ends in {n_embd}, so it must be ({n_embd},)")
    if weight.ndim != 2 or weight.shape[0] != n_embd:
        raise ValueError(f"{OP}: x ends in {n_embd} and weight is {tuple(weight.shape)}; it must be [{n_embd}, out]")
    if bias.shape != weight.shape[1:]:
        raise ValueError(f"{OP}: bias is {tuple(bias.shape)}; weight gives {weight.shape[1]} outputs")
    tensors = {"residual": residual, "ln_weight": ln_weight, "ln_bias": ln_bias, "weight": weight, "bias": bias}
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{OP}: {name} is on {t.device} and x on {x.device}; move them to one device")
    if residual is not None and residual.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{OP}: residual is {residual.dtype} and x {x.dtype}; it must be x's dtype or float32")
    if residual is None and dropout_p > 0.0:
        raise ValueError(f"{OP}: dropout_p is {dropout_p} and residual is None; dropout acts on what is added")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation is {activation!r}; choose {', '.join(ACTIVATIONS)}")
    philox.check(OP, dropout_p, rng, x.device)


def layernorm_linear_gelu(
    x: Tensor,
    residual: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    activation: str = "gelu_new",
    return_u: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]:
    """Dropout, residual add, LayerNorm, matrix product, bias and GELU.

    Args:
        x: [..., C], what is added to the stream; or, with no residual, the stream itself.
        residual: [..., C] or None. In x's dtype, or float32 beside a lower-precision x.
        ln_weight, ln_bias: [C], of the LayerNorm.
        weight, bias: [C, F] (Conv1D's layout; nn.Linear's weight.t() does as well, and its gradient then has that
            layout too) and [F], in x's dtype (cast to autocast's inside `torch.autocast`).
        eps: added to the variance.
        dropout_p, rng, site: dropout of x before the add, as in `add_layernorm`.
        activation: one of ACTIVATIONS: "gelu_new" or "gelu_pytorch_tanh", GPT-2's tanh form, or "gelu", by erf.
        return_u: for the `linear` that y goes to, return u besides, where remaking y from it is worth the time.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        y [..., F] in weight's dtype (autocast's inside `torch.autocast`), and h [..., C] = residual + dropout(x) in
        residual's dtype; h is x when there is no residual. With return_u, also u [..., F] in y's dtype, without a
        gradient; None where it is not kept, and on a GPU, where memory is seldom what a step waits for.

    Raises:
        ValueError: shapes, dtypes, devices, dropout_p or an activation that do not fit.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    _validate(x, residual, ln_weight, ln_bias, weight, bias, dropout_p, rng, activation)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), bias.to(dtype)
    for name, t in (("weight", weight), ("bias", bias)):
        if t.dtype != dtype:
            raise ValueError(f"{OP}: {name} is {t.dtype} and x {dtype}; they must match")
    name = dispatch.choose(OP, impl, x.device, x.dtype)
    if name == "reference":
        y, h = layernorm_linear_gelu_reference(
            x, residual, ln_weight, ln_bias, weight, bias,
            eps=eps, dropout_p=dropout_p, rng=rng, site=site, activation=activation,
        )  # fmt: skip
        return (y, h, None) if return_u else (y, h)
    erf = ACTIVATIONS[activation] == "none"
    tensors = (x, residual, ln_weight, ln_bias, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, h, u = _LayerNormLinearGelu.apply(*tensors, eps, dropout_p, rng, site, erf, name)
    else:
        u = None
        y, h, *_ = torch.ops.gpt2_fast.layernorm_linear_gelu(*tensors, eps, dropout_p, rng, site, erf, False, name)
    h = x if residual is None else h
    return (y, h, u if name == "cpp" else None) if return_u else (y, h)


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (x, residual, ln_weight, ln_bias, weight, bias, options) for tests and benchmarks, smallest first."""
    generator = torch.Generator().manual_seed(0)
    for shape, width, dropout_p, has_residual, activation in [
        ((1, 1, 20), 28, 0.0, True, "gelu"), ((5, 20), 36, 0.0, False, "gelu_new"), ((3, 96), 100, 0.1, True, "gelu"),
        ((65, 96), 384, 0.1, True, "gelu_new"), ((65, 96), 65, 0.0, False, "gelu"), ((3, 768), 96, 0.0, True, "gelu"),
    ]:  # fmt: skip
        x, residual = (torch.randn(shape, generator=generator) for _ in range(2))
        ln_weight, ln_bias = (torch.randn(shape[-1], generator=generator) * 0.3 for _ in range(2))
        weight = torch.randn(shape[-1], width, generator=generator) * shape[-1] ** -0.5
        bias = torch.randn(width, generator=generator)
        tensors = [t.to(device, dtype) for t in (x, residual, ln_weight + 1.0, ln_bias, weight, bias)]
        rng = torch.tensor([0x1234_5678_9ABC_DEF0], device=device) if dropout_p else None
        if not has_residual:
            tensors[1] = None
        yield (*tensors, {"dropout_p": dropout_p, "rng": rng, "site": 3, "activation": activation})


def cost(n_rows: int, n_embd: int, width: int, itemsize: int) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one call with a residual, each way; the FLOPs are those of the products.

    Every input and output is counted once, with what forward must keep: h, u and the row statistics.
    """
    rows, inner, weight = (itemsize * n for n in (n_rows * n_embd, n_rows * width, n_embd * width))
    ln, bias, stats = itemsize * 2 * n_embd, itemsize * width, 8 * n_rows
    flops = 2 * n_rows * n_embd * width
    return {
        "forward": {"bytes": 3 * rows + 2 * inner + weight + ln + bias + stats, "flops": flops},
        "backward": {"bytes": 3 * rows + 2 * inner + 2 * weight + 2 * ln + bias + stats, "flops": 2 * flops},
    }
