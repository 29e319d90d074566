"""add_layernorm: what is its own; test_shared.py holds it to float64 and to the contract of all operations."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import DEVICE
from numerics import check_op

from gpt2_fast.ops.add_layernorm import add_layernorm
from gpt2_fast.ops.runtime.philox import Dropout, keep_rows

IMPLS = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_stream_beside_bfloat16(impl):
    """Under autocast the stream stays float32, what is added and what comes out are bfloat16."""
    x, residual = torch.randn(5, 96, device=DEVICE).bfloat16(), torch.randn(5, 96, device=DEVICE)
    weight, bias = torch.randn(96, device=DEVICE), torch.randn(96, device=DEVICE)
    _, h = add_layernorm(x, residual, weight, bias, impl=impl)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h, residual + x.float(), rtol=0, atol=0)
    for stream in (residual, None):
        with torch.autocast(DEVICE, torch.bfloat16):
            y, _ = add_layernorm(x.float() if stream is None else x, stream, weight, bias, impl=impl)
        expected = x.float() if stream is None else h
        expected = torch.nn.functional.layer_norm(expected, (96,), weight, bias)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("stream", [True, False], ids=["float32 stream", "low-precision stream"])
@pytest.mark.parametrize(("inside", "dtype"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
@pytest.mark.parametrize("impl", IMPLS)
def test_one_low_precision_beside_the_other(impl, inside, dtype, stream):
    """A float16 model under autocast to bfloat16, and the other way round."""
    x, residual, weight, bias = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((5, 96), (5, 96), 96, 96))
    inputs = [x, residual.float() if stream else residual, weight, bias]

    def run(*tensors, impl=impl):
        with torch.autocast(DEVICE, inside):
            y, h = add_layernorm(*tensors, impl=impl)
        assert y.dtype == (torch.float64 if tensors[0].dtype == torch.float64 else inside)
        return y, h

    check_op(run, partial(run, impl="reference"), inputs, torch.bfloat16)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_drops_the_reference_mask(impl):
    x = torch.ones(37, 100, device=DEVICE)
    residual, weight = torch.zeros_like(x), torch.ones(100, device=DEVICE)
    dropout = Dropout(0.3, torch.tensor([-987654321012345], device=DEVICE), 7)
    _, h = add_layernorm(x, residual, weight, torch.zeros_like(weight), dropout=dropout, impl=impl)
    keep = keep_rows(dropout.key, 7, 37, 100, 0.3)
    assert torch.equal(h != 0, keep)
    torch.testing.assert_close(h[keep], torch.full_like(h[keep], dropout.scale))


def test_dropout_of_nothing_is_refused():
    x, weight = torch.randn(3, 96), torch.randn(96)
    with pytest.raises(ValueError, match="dropout's p is 0.1 and residual is None; it acts on what is added"):
        add_layernorm(x, None, weight, weight, dropout=Dropout(0.1, torch.tensor([5])))
