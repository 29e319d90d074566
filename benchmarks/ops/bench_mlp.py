"""mlp, and its half up to the GELU, beside F.layer_norm, F.linear and F.gelu."""

import torch
import torch.nn.functional as F

from benchmarks.ops.harness import Case, Size
from gpt2_fast.ops.mlp import cost, layernorm_linear_gelu, mlp, mlp_reference

DIRECTIONS = ("forward", "backward")
LIBRARY = "F.layer_norm, F.linear, F.gelu"


def _library(x, residual, ln_weight, ln_bias, fc_weight, fc_bias, proj_weight=None, proj_bias=None):
    h = residual + x
    n = F.layer_norm(h, h.shape[-1:], ln_weight, ln_bias)
    f = F.gelu(F.linear(n, fc_weight.t(), fc_bias), approximate="tanh")
    return f if proj_weight is None else F.linear(f, proj_weight.t(), proj_bias), h


def _inputs(size: Size, dtype: torch.dtype, device: str) -> tuple:
    C, width = size.n_embd, 4 * size.n_embd
    shapes = [(size.B, size.T, C)] * 2 + [(C,), (C,), (C, width), (width,), (width, C), (C,)]
    tensors = [torch.randn(s, device=device) for s in shapes]
    return tuple((t * t.shape[0] ** -0.5 if t.ndim == 2 else t).to(dtype) for t in tensors)


def whole(size: Size, dtype: torch.dtype, device: str) -> Case:
    inputs, C = _inputs(size, dtype, device), size.n_embd
    return Case(
        shape=f"[{size.B}, {size.T}, {C}] @ [{C}, {4 * C}] @ [{4 * C}, {C}]",
        inputs=inputs,
        programs={"gpt2_fast": mlp, "library": _library, "eager": mlp_reference},
        cost=cost(size.B * size.T, C, 4 * C, dtype.itemsize),
        check_inputs=(inputs[0][:1], inputs[1][:1], *inputs[2:]),
    )


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    """Up to the GELU: what the Triton kernels of mlp.py are tuned by, and what earlier results have."""
    inputs, C = _inputs(size, dtype, device)[:6], size.n_embd
    return Case(
        shape=f"[{size.B}, {size.T}, {C}] @ [{C}, {4 * C}]",
        inputs=inputs,
        programs={"gpt2_fast": layernorm_linear_gelu, "library": _library, "eager": mlp_reference},
        cost=cost(size.B * size.T, C, 4 * C, dtype.itemsize, projects=False),
        check_inputs=(inputs[0][:1], inputs[1][:1], *inputs[2:]),
        op="layernorm_linear_gelu",
    )


def test_mlp(measure):
    measure(whole)


def test_layernorm_linear_gelu(measure):
    measure(case)
