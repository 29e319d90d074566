"""add_layernorm beside its reference, which is the add and F.layer_norm: the library's own."""

import torch

from benchmarks.ops.harness import Case, Size
from gpt2_fast.ops.add_layernorm import add_layernorm, add_layernorm_reference, cost

DIRECTIONS = ("forward", "backward")


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    rows = (size.B, size.T, size.n_embd)
    x, residual, weight, bias = (torch.randn(s, device=device).to(dtype) for s in (rows, rows, rows[2:], rows[2:]))
    return Case(
        shape=f"[{size.B}, {size.T}, {size.n_embd}]",
        inputs=(x, residual, weight, bias),
        programs={"gpt2_fast": add_layernorm, "eager": add_layernorm_reference},
        cost=cost(size.B * size.T, size.n_embd, dtype.itemsize),
        check_inputs=(x[:1], residual[:1], weight, bias),
    )


def test_add_layernorm(measure):
    measure(case)
