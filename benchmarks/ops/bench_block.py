"""block, one layer as one call on a CPU, beside the same layer of torch's functions."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.ops.bench_attention import sdpa
from benchmarks.ops.harness import Case, Size
from gpt2_fast.ops.block import block, block_reference, cost

DIRECTIONS = ("forward", "backward")
LIBRARY = "F.layer_norm, F.linear, F.scaled_dot_product_attention, F.gelu"


def _library(m, h, segments, *parameters, n_head):
    (ln_1_weight, ln_1_bias, attn, attn_bias, proj, proj_bias, ln_2_weight, ln_2_bias, fc, fc_bias, mlp_proj,
     mlp_proj_bias) = parameters  # fmt: skip
    (B, T, C), h = m.shape, h + m
    y = F.layer_norm(h, (C,), ln_1_weight, ln_1_bias)
    out = sdpa(F.linear(y, attn.t(), attn_bias).view(B, T, 3, n_head, C // n_head))
    h = h + F.linear(out.view(B, T, C), proj.t(), proj_bias)
    n = F.layer_norm(h, (C,), ln_2_weight, ln_2_bias)
    return F.linear(F.gelu(F.linear(n, fc.t(), fc_bias), approximate="tanh"), mlp_proj.t(), mlp_proj_bias), h


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    if device != "cpu":
        pytest.skip("on a GPU the operations of a layer are called in turn")
    C, heads = size.n_embd, {"n_head": size.n_head}
    shapes = [(C,), (C,), (C, 3 * C), (3 * C,), (C, C), (C,), (C,), (C,), (C, 4 * C), (4 * C,), (4 * C, C), (C,)]
    rows = [torch.randn(size.B, size.T, C).to(dtype) for _ in range(2)]
    parameters = [torch.randn(s) * (s[0] ** -0.5 if len(s) == 2 else 1.0) for s in shapes]
    parameters = [p.to(dtype) for p in parameters]
    of = lambda program: lambda *tensors: program(*tensors[:2], None, *tensors[2:], **heads)
    return Case(
        shape=f"[{size.B}, {size.T}, {C}], {size.n_head} heads",
        inputs=(*rows, *parameters),
        programs={"gpt2_fast": of(block), "library": of(_library), "eager": of(block_reference)},
        cost=cost(size.B, size.T, size.n_head, C, 4 * C, dtype.itemsize),
        check_inputs=(rows[0][:1], rows[1][:1], *parameters),
    )


def test_block(measure):
    measure(case)
