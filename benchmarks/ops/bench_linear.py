"""linear in its three places of a block (c_attn, and both c_proj) beside F.linear, on the same Conv1D weight."""

import torch
import torch.nn.functional as F

from benchmarks.ops.harness import Case, Size
from gpt2_fast.ops.linear import cost, linear, linear_reference

DIRECTIONS = ("forward", "backward")
LIBRARY = "F.linear"


def _library(x, weight, bias):
    return F.linear(x, weight.t(), bias)


def _case(size: Size, dtype: torch.dtype, device: str, n_in: int, n_out: int) -> Case:
    shapes = (size.B, size.T, n_in), (n_in, n_out), (n_out,)
    x, weight, bias = (torch.randn(s, device=device).to(dtype) for s in shapes)
    weight *= n_in**-0.5
    return Case(
        shape=f"[{size.B}, {size.T}, {n_in}] @ [{n_in}, {n_out}]",
        inputs=(x, weight, bias),
        programs={"gpt2_fast": linear, "library": _library, "eager": linear_reference},
        cost=cost(size.B * size.T, n_in, n_out, dtype.itemsize),
        check_inputs=(x[:1], weight, bias),
    )


def c_attn(size: Size, dtype: torch.dtype, device: str) -> Case:
    return _case(size, dtype, device, size.n_embd, 3 * size.n_embd)


def attn_c_proj(size: Size, dtype: torch.dtype, device: str) -> Case:
    return _case(size, dtype, device, size.n_embd, size.n_embd)


def mlp_c_proj(size: Size, dtype: torch.dtype, device: str) -> Case:
    return _case(size, dtype, device, 4 * size.n_embd, size.n_embd)


def test_c_attn(measure):
    measure(c_attn)


def test_attn_c_proj(measure):
    measure(attn_c_proj)


def test_mlp_c_proj(measure):
    measure(mlp_c_proj)
