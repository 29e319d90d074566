"""GPT-2's MLP with what comes before it: h = residual + dropout(x); m = gelu(LayerNorm(h) @ c_fc) @ c_proj.

    n = (h - mean) * rstd * ln_weight + ln_bias     u = n @ fc_weight + fc_bias
    f = gelu(u)                                     m = f @ proj_weight + proj_bias

Backward, then that of add_layernorm from dn:

    dproj_weight = f^T @ dm     dproj_bias = sum over rows of dm     df = dm @ proj_weight^T
    dfc_weight = n^T @ du       dfc_bias = sum over rows of du       du = df * gelu'(u)     dn = du @ fc_weight^T

Saved for backward: h, u and the row statistics; on a CPU n and f are made again, so that of the two widest tensors
there is one. On a GPU, where memory is seldom what a step waits for, both are kept. torch keeps h, n, u, f and the
dropout mask, and takes seven passes around the first product where there are two here. On a GPU up to 64 rows are
normalised tile by tile inside Triton's product, so n is not written before backward; more are normalised in a pass, as
the vendor's product is faster. The passes for GELU and its derivative go where kernels/configs/linear_gelu.json takes
Triton's persistent products. On a CPU n is float32 wherever the product is (see `cpu_policy`), which takes GELU before
it stores where it is this package's own; around the vendor's, the pass that adds the bias does both.

Without proj_weight the operation ends at f: `layernorm_linear_gelu`, for a c_proj that is called as a module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_fast.ops import add_layernorm
from gpt2_fast.ops.runtime.contract import FLOAT, FLOATS, STREAM, STRIDED, Input
from gpt2_fast.ops.runtime.cpu_policy import cpu_policy
from gpt2_fast.ops.runtime.declare import Backend, Op, autocast_dtype, autocasts
from gpt2_fast.ops.runtime.gelu import Gelu, bias_gelu, bias_gelu_backward, gelu, kind_of
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout, check_addition
from gpt2_fast.ops.runtime.products import (
    bias_gradient,
    gelu_product,
    is_transposed,
    product,
    takes_own_product,
    weight_gradient,
)


def mlp_reference(
    x: Tensor,
    residual: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dropout: Dropout = NO_DROPOUT,
    kind: Gelu = Gelu.TANH,
) -> tuple[Tensor, Tensor]:
    """What is correct: see `mlp`. Any device and floating dtype, under autograd."""
    n, h = add_layernorm.add_layernorm_reference(x, residual, ln_weight, ln_bias, eps=eps, dropout=dropout)
    f = F.gelu(n.to(fc_weight.dtype) @ fc_weight + fc_bias, approximate=Gelu(kind).approximate)
    if proj_weight is not None:
        f = f @ proj_weight if proj_bias is None else f @ proj_weight + proj_bias
    return f, h


def _keeps_n(a) -> bool:
    """Whether forward has n in memory, and backward does not make it again: of many rows, on a GPU."""
    if not a.save or a.impl == "cpp":
        return False
    from gpt2_fast.kernels.mlp import FEW_ROWS

    return a.N > FEW_ROWS


def _outputs(a):
    """f is what is returned where there is no proj_weight; else it is kept where backward does not make it again."""
    rows, dtype, projects = a.x.shape[:-1], a.fc_weight.dtype, a.proj_weight is not None
    wide = ((*rows, a.F), dtype)
    return {
        "m": ((*rows, a.O), dtype) if projects else wide,
        "h": None if a.residual is None else (a.x.shape, a.residual.dtype),
        "u": wide if a.save else None,
        "f": wide if a.save and projects and a.impl != "cpp" else None,
        "n": (a.x.shape, dtype) if _keeps_n(a) else None,
        "mean": ((a.N,), torch.float32),
        "rstd": ((a.N,), torch.float32),
    }


def _gradients(a):
    """Triton's sums over rows are rounded as they are stored; C++ has them in float32."""
    separate = a.has_residual and (a.dropout.p > 0.0 or a.x_dtype != a.h.dtype)
    of_ln, of_bias = (a.ln_weight.dtype, a.u.dtype) if a.impl == "triton" else (torch.float32, torch.float32)
    needs = a.needs
    weight = lambda w: (w.shape, w.dtype, is_transposed(w))
    return {
        "dx": (a.h.shape, a.x_dtype) if separate else None,
        "dresidual": (a.h.shape, a.h.dtype),
        "dln_weight": ((a.C,), of_ln),
        "dln_bias": ((a.C,), of_ln),
        "dfc_weight": weight(a.fc_weight) if needs["fc_weight"] else None,
        "dfc_bias": ((a.F,), of_bias),
        "dproj_weight": weight(a.proj_weight) if needs["proj_weight"] else None,
        "dproj_bias": ((a.O,), a.dm.dtype) if needs["proj_bias"] else None,
    }


def _project(a, out, f: Tensor) -> None:
    """m from f [N, F]."""
    if a.proj_weight is not None:
        f = product(f, a.proj_weight, a.proj_bias)
    # No view of f, which nobody else has: FSDP2 warns of views, as a hook on one is lost when it is written in place.
    out.m = torch.ops.aten._unsafe_view(f, [*a.x.shape[:-1], f.shape[1]])


def _project_gradients(a, out, f: Tensor | None) -> None:
    """The gradients of c_proj's parameters. f: None where it has to be made from u."""
    dm, kind = a.dm.view(a.N, -1), Gelu(a.kind)
    if a.needs["proj_weight"]:  # before df, so that it and a remade f are not in memory together
        f = gelu(a.u.view(a.N, -1), kind) if f is None else f.view(a.N, -1)
        out.dproj_weight = weight_gradient(f, dm, a.proj_weight)
    if a.needs["proj_bias"]:
        out.dproj_bias = bias_gradient(dm)


def _forward_cpp(a, out):
    dtype, kind = a.fc_weight.dtype, Gelu(a.kind)
    wide = cpu_policy().product_dtype(dtype)
    ln = (a.x, a.residual, a.ln_weight, a.ln_bias, a.eps, *a.dropout)
    made = add_layernorm.OP.write_forward((*ln, wide, True, "cpp"))
    n, out.h, out.mean, out.rstd = made["y"].view(a.N, a.C), made["h"], made["mean"], made["rstd"]
    if takes_own_product(n):
        f, u = gelu_product(n, a.fc_weight, a.fc_bias, dtype, a.save, kind)
    else:
        f, u = bias_gelu(product(n, a.fc_weight.to(wide)), a.fc_bias, dtype, a.save, kind)
    out.u = None if u is None else u.view(*a.x.shape[:-1], a.F)
    _project(a, out, f)


def _backward_cpp(a, out):
    df = a.dm.view(a.N, -1)
    if a.proj_weight is not None:
        _project_gradients(a, out, None)
        df = product(df, a.proj_weight.t())
    wide = cpu_policy().product_dtype(a.fc_weight.dtype)
    du, out.dfc_bias = bias_gelu_backward(df, a.u.view(a.N, a.F), wide, Gelu(a.kind))
    del df
    if a.needs["fc_weight"]:
        n = add_layernorm.normalized(a.h, a.ln_weight, a.ln_bias, a.mean, a.rstd, wide).view(a.N, a.C)
        out.dfc_weight = weight_gradient(n, du, a.fc_weight)
        del n  # before dn, which is as large
    dn = product(du, a.fc_weight.t()).view(a.h.shape)
    kept = (a.h, a.ln_weight, a.mean, a.rstd, a.eps, *a.dropout, wide, a.x_dtype, a.has_residual)
    made = add_layernorm.OP.write_backward((dn, a.dh, *kept, [True] * 4, "cpp"))
    out.dx, out.dresidual, out.dln_weight, out.dln_bias = (made[f"d{i}"] for i in ("x", "residual", "weight", "bias"))


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.view(-1, t.shape[-1])


def _forward_triton(a, out):
    from gpt2_fast.kernels import mlp as kernel

    f, n, h, u, out.mean, out.rstd = kernel.forward(
        _rows(a.x), _rows(a.residual), a.ln_weight, a.ln_bias, a.fc_weight, a.fc_bias, a.eps, *a.dropout, bool(a.kind),
        a.fc_weight.dtype,
    )  # fmt: skip
    shape = (*a.x.shape[:-1], a.F)
    out.h = None if a.residual is None else h.view(a.x.shape)
    if a.save:
        out.u = u.view(shape)
        out.f = f.view(shape) if a.proj_weight is not None else None
        out.n = None if n is None else n.view(a.x.shape)
    del n, u  # before m is made, where nobody keeps them
    _project(a, out, f)


def _backward_triton(a, out):
    from gpt2_fast.kernels import mlp as kernel

    dm, u, erf = a.dm.view(a.N, -1), _rows(a.u), bool(a.kind)
    if a.proj_weight is None:
        du, out.dfc_bias = kernel.gelu_backward(dm, u, erf, u.dtype)
    else:
        _project_gradients(a, out, a.f)
        du, out.dfc_bias = kernel.product_gelu_backward(dm, a.proj_weight, u, erf, u.dtype)
    dx, dresidual, out.dln_weight, out.dln_bias, dfc_weight = kernel.backward(
        du, _rows(a.dh), _rows(a.n), _rows(a.h), a.mean, a.rstd, a.ln_weight, a.ln_bias, a.fc_weight, *a.dropout,
        a.x_dtype, a.has_residual,
    )  # fmt: skip
    out.dx, out.dresidual = None if dx is None else dx.view(a.h.shape), dresidual.view(a.h.shape)
    out.dfc_weight = dfc_weight if a.needs["fc_weight"] else None


def _check(x, residual, ln_weight, ln_bias, fc_weight, fc_bias, proj_weight, proj_bias, *, eps, dropout, **_):
    add_layernorm.check_eps("mlp", eps=eps)
    check_addition("mlp", residual, dropout)
    if proj_weight is None and proj_bias is not None:
        raise ValueError("mlp: proj_weight is None and proj_bias is not; give both, the weight alone, or neither")


OP = Op(
    "mlp",
    inputs=(
        Input("x", "... C", FLOAT),
        Input("residual", "... C", STREAM, optional=True),
        Input("ln_weight", "C", FLOAT),
        Input("ln_bias", "C", FLOAT),
        Input("fc_weight", "C F", FLOAT, read=STRIDED),
        Input("fc_bias", "F", FLOAT),
        Input("proj_weight", "F O", FLOAT, optional=True, read=STRIDED),
        Input("proj_bias", "O", FLOAT, optional=True),
    ),
    options={"eps": float, "dropout": Dropout, "kind": int},
    check=_check,
    reference=mlp_reference,
    outputs=_outputs,
    output_names=("m", "h", "u", "f", "n", "mean", "rstd"),
    returns=("m", "h"),
    saved=dict.fromkeys(("mean", "rstd"), "N")
    | {"h|x": "... C", "u": "... F", "f": "... F", "n": "... C", "ln_weight": "C", "ln_bias": "C"}
    | {"fc_weight": "C F", "proj_weight": "F O"},
    carry={"x_dtype": (torch.dtype, lambda a: a.x.dtype), "has_residual": (bool, lambda a: a.residual is not None)},
    gradients=_gradients,
    alias={"x": "residual"},
    backends={"cpp": Backend(_forward_cpp, _backward_cpp), "triton": Backend(_forward_triton, _backward_triton)},
    on={"cpu": ("cpp",), "cuda": ("triton",)},
)


def mlp(
    x: Tensor,
    residual: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    dropout: Dropout = NO_DROPOUT,
    activation: str = "gelu_new",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dropout, residual add, LayerNorm, product, bias, GELU, product and bias: GPT-2's second half of a block.

    Args:
        x: [..., C], what is added to the stream; or, with no residual, the stream itself.
        residual: [..., C] or None. In x's dtype, or float32 beside a lower-precision x.
        ln_weight, ln_bias: [C], of the LayerNorm.
        fc_weight, fc_bias: [C, F] (Conv1D's layout; nn.Linear's weight.t() does as well, and its gradient then has
            that layout too) and [F], in x's dtype (cast to autocast's inside `torch.autocast`).
        proj_weight, proj_bias: [F, O] and [O] or None, as those; both None: the operation ends at the GELU.
        eps: added to the variance.
        dropout: of x before the add, as in `add_layernorm`.
        activation: "gelu_new" or "gelu_pytorch_tanh", GPT-2's tanh form, or "gelu", by erf.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        m [..., O], or gelu(u) [..., F], in the weights' dtype (autocast's inside `torch.autocast`), and h [..., C] =
        residual + dropout(x) in residual's dtype; h is x when there is no residual.

    Raises:
        ValueError: shapes, dtypes, devices, eps, dropout or an activation that do not fit.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    kind, dtype = kind_of("mlp", activation), autocast_dtype(x)
    ln_weight, ln_bias = add_layernorm.of_one_dtype(ln_weight, ln_bias)
    weights = {"fc_weight": fc_weight, "fc_bias": fc_bias, "proj_weight": proj_weight, "proj_bias": proj_bias}
    for name, t in weights.items():
        if isinstance(t, Tensor) and isinstance(x, Tensor) and t.dtype != dtype:
            if not autocasts(x):
                raise ValueError(f"mlp: {name} is {t.dtype} and x {dtype}; they must match")
            weights[name] = t.to(dtype) if t.dtype in FLOATS else t
    m, h = OP(x, residual, ln_weight, ln_bias, *weights.values(), eps=eps, dropout=dropout, kind=kind, impl=impl)
    return m, x if residual is None else h


def layernorm_linear_gelu(
    x: Tensor,
    residual: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout: Dropout = NO_DROPOUT,
    activation: str = "gelu_new",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`mlp` up to its GELU: (gelu(LayerNorm(h) @ weight + bias) [..., F], h [..., C]), the same arguments."""
    options = {"eps": eps, "dropout": dropout, "activation": activation, "impl": impl}
    return mlp(x, residual, ln_weight, ln_bias, weight, bias, None, None, **options)


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (x, residual, ln_weight, ln_bias, fc_weight, fc_bias, proj_weight, proj_bias, options), smallest first."""
    generator = torch.Generator().manual_seed(0)
    for shape, width, dropout_p, has_residual, activation in [
        ((1, 1, 20), 28, 0.0, True, "gelu"), ((5, 20), 36, 0.0, False, "gelu_new"), ((3, 96), 100, 0.1, True, "gelu"),
        ((65, 96), 384, 0.1, True, "gelu_new"), ((65, 96), 65, 0.0, False, "gelu"), ((3, 768), 96, 0.0, True, "gelu"),
    ]:  # fmt: skip
        x, residual = (torch.randn(shape, generator=generator) for _ in range(2))
        ln_weight, ln_bias = (torch.randn(shape[-1], generator=generator) * 0.3 for _ in range(2))
        weight = torch.randn(shape[-1], width, generator=generator) * shape[-1] ** -0.5
        bias = torch.randn(width, generator=generator)
        tensors = [x, residual, ln_weight + 1.0, ln_bias, weight, bias]
        tensors.append(torch.randn(width, shape[-1], generator=generator) * width**-0.5)
        tensors.append(torch.randn(shape[-1], generator=generator))
        tensors = [t.to(device, dtype) for t in tensors]
        key = torch.tensor([0x1234_5678_9ABC_DEF0], device=device) if dropout_p else None
        if not has_residual:
            tensors[1] = None
        yield (*tensors, {"dropout": Dropout(dropout_p, key, 3), "activation": activation})


def cost(n_rows: int, n_embd: int, width: int, itemsize: int, projects: bool = True) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one call with a residual, each way; the FLOPs are those of the products.

    Every input and output is counted once, with what forward must keep: h, u and the row statistics. What a GPU keeps
    besides, n and f, costs it no more bytes than to make them again. projects: with c_proj; otherwise the operation
    ends at the GELU, whose result is then an output.
    """
    rows, inner, weight = (itemsize * n for n in (n_rows * n_embd, n_rows * width, n_embd * width))
    ln, bias, stats = itemsize * 2 * n_embd, itemsize * width, 8 * n_rows
    flops = 2 * n_rows * n_embd * width
    forward, backward = 3 * rows + 2 * inner + weight, 3 * rows + 2 * inner + 2 * weight
    if projects:  # m instead of f, and a second weight
        forward, backward, flops = forward + rows - inner + weight, backward + rows - inner + 2 * weight, 2 * flops
        bias += itemsize * n_embd
    return {
        "forward": {"bytes": forward + ln + bias + stats, "flops": flops},
        "backward": {"bytes": backward + 2 * ln + bias + stats, "flops": 2 * flops},
    }
