"""mlp, and its half up to the GELU, beside F.layer_norm, F.linear and F.gelu.

On a GPU with tiles in kernels/configs/linear_gelu.json mlp is timed once as that table chooses, and once by the
persistent products, whatever it chooses.
"""

import contextlib
from dataclasses import replace

import pytest
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


def persistent(size: Size, dtype: torch.dtype, device: str) -> Case:
    """`whole`, as a case of its own."""
    from gpt2_fast.kernels import tuning
    from gpt2_fast.kernels.aot import config_arch

    found = tuning.config("linear_gelu", "forward", config_arch(torch.device(device)), dtype.itemsize)
    if found["product"] != "persistent":
        pytest.skip(f"no persistent product for {dtype} on this card")
    return replace(whole(size, dtype, device), op="mlp, persistent products")


@pytest.fixture
def persistent_products():
    """While a test lasts the products that have tiles are the persistent kernels'."""
    if not torch.cuda.is_available():
        pytest.skip("the persistent products are a GPU's")
    from gpt2_fast.kernels import tuning

    with contextlib.ExitStack() as stack:
        for index, row in enumerate(tuning.rows("linear_gelu")):
            if "num_warps" in row["config"]:
                stack.enter_context(tuning.trial("linear_gelu", index, {**row["config"], "product": "persistent"}))
        yield


def test_mlp(measure):
    measure(whole)


def test_mlp_persistent(persistent_products, measure):
    measure(persistent)


def test_layernorm_linear_gelu(measure):
    measure(case)
