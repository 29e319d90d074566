"""add_layernorm: what is its own; test_shared.py holds it to float64 and to the contract of all operations."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from conftest import DEVICE
from numerics import DTYPES, assert_same_bits, check_op

from gpt2_fast.ops import add_layernorm as room
from gpt2_fast.ops.add_layernorm import add_layernorm
from gpt2_fast.ops.mlp import mlp
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_stores_the_parameters_gradients_in_their_dtype(dtype):
    """The float32 sums, rounded once: no kernel casts them afterwards."""
    kernel = pytest.importorskip("gpt2_fast.kernels.add_layernorm")
    dy, h, weight = (torch.randn(*size, device=DEVICE).to(dtype) for size in ((33, 20), (33, 20), (20,)))
    mean, rstd = h.float().mean(1), h.float().std(1)
    made = room.OP.write_backward(
        (dy, None, h, weight, mean, rstd, 1e-5, *Dropout().flat(), dtype, dtype, False, [True] * 4, "triton")
    )
    *_, dweight, dbias = kernel.backward(dy, None, h, weight, mean, rstd, 0.0, None, 0, dtype, False)
    assert dweight.dtype == torch.float32
    assert_same_bits([made["dweight"], made["dbias"]], [dweight.to(dtype), dbias.to(dtype)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("swapped", [False, True])
def test_parameters_of_two_dtypes_have_gradients_of_their_own_accuracy(impl, swapped):
    x, coarse, fine = torch.randn(33, 20, device=DEVICE).bfloat16(), torch.randn(20, device=DEVICE), torch.randn(20)
    coarse, fine = coarse.bfloat16().requires_grad_(), fine.to(DEVICE).requires_grad_()
    weight, bias = (fine, coarse) if swapped else (coarse, fine)
    upstream = torch.randn(33, 20, device=DEVICE).bfloat16()
    found = torch.autograd.grad(add_layernorm(x, None, weight, bias, impl=impl)[0], (coarse, fine), upstream)
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32]
    n = torch.nn.functional.layer_norm(x.double(), (20,))
    of_weight, of_bias = (upstream.double() * n).sum(0), upstream.double().sum(0)
    expected = (of_bias, of_weight) if swapped else (of_weight, of_bias)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=4e-3, atol=1e-4)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps", [-1e-5, math.nan, math.inf])
def test_what_cannot_be_added_to_a_variance_raises(eps):
    x, weight = torch.randn(3, 20), torch.ones(20)
    with pytest.raises(ValueError, match=f"add_layernorm: eps is {eps}; it must be at least 0 and finite"):
        add_layernorm(x, None, weight, weight, eps=eps)
    with pytest.raises(ValueError, match=f"mlp: eps is {eps}; it must be at least 0 and finite"):
        mlp(x, None, weight, weight, torch.ones(20, 4), torch.ones(4), None, None, eps=eps)
