"""layernorm_linear_gelu (the MLP's first half) beside F.layer_norm, F.linear and F.gelu."""

import torch
import torch.nn.functional as F
from gpt2_fast.ops.layernorm_linear_gelu import cost, layernorm_linear_gelu, layernorm_linear_gelu_reference

from benchmarks.ops.harness import Case, Size

DIRECTIONS = ("forward", "backward")
LIBRARY = "F.layer_norm, F.linear, F.gelu"


def _library(x, residual, ln_weight, ln_bias, weight, bias):
    h = residual + x
    n = F.layer_norm(h, h.shape[-1:], ln_weight, ln_bias)
    return F.gelu(F.linear(n, weight.t(), bias), approximate="tanh"), h


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    C, width = size.n_embd, 4 * size.n_embd
    shapes = [(size.B, size.T, C)] * 2 + [(C,), (C,), (C, width), (width,)]
    x, residual, ln_weight, ln_bias, weight, bias = (torch.randn(s, device=device) for s in shapes)
    inputs = [t.to(dtype) for t in (x, residual, ln_weight, ln_bias, weight * C**-0.5, bias)]
    return Case(
        shape=f"[{size.B}, {size.T}, {C}] @ [{C}, {width}]",
        inputs=tuple(inputs),
        programs={"gpt2_fast": layernorm_linear_gelu, "library": _library, "eager": layernorm_linear_gelu_reference},
        cost=cost(size.B * size.T, C, width, dtype.itemsize),
        check_inputs=(inputs[0][:1], inputs[1][:1], *inputs[2:]),
    )


def test_layernorm_linear_gelu(measure):
    measure(case)
