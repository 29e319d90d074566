"""linear (c_attn's shape) beside F.linear, on the same Conv1D weight."""

import torch
import torch.nn.functional as F

from benchmarks.ops.harness import Case, Size
from gpt2_fast.ops.linear import cost, linear, linear_reference

DIRECTIONS = ("forward", "backward")
LIBRARY = "F.linear"


def _library(x, weight, bias):
    return F.linear(x, weight.t(), bias)


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    C, out = size.n_embd, 3 * size.n_embd
    x, weight, bias = (torch.randn(s, device=device).to(dtype) for s in ((size.B, size.T, C), (C, out), (out,)))
    return Case(
        shape=f"[{size.B}, {size.T}, {C}] @ [{C}, {out}]",
        inputs=(x, weight * C**-0.5, bias),
        programs={"gpt2_fast": linear, "library": _library, "eager": linear_reference},
        cost=cost(size.B * size.T, C, out, dtype.itemsize),
        check_inputs=(x[:1], weight * C**-0.5, bias),
    )


def test_linear(measure):
    measure(case)
