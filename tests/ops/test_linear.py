"""linear: vendor products against float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from numerics import DTYPES, assert_same_bits, check_op, evaluate

from gpt2_fast.ops import linear as room
from gpt2_fast.ops.linear import CpuPolicy, linear, linear_reference, samples


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype):
    for inputs in samples(DEVICE, dtype):
        check_op(lambda *t: linear(*t, impl="aten"), linear_reference, inputs, dtype, f"{dtype}")


@pytest.mark.parametrize("policy", [CpuPolicy("onednn", True, ""), CpuPolicy("mkl", True, "")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_policy_is_right(policy, dtype, monkeypatch):
    """What another processor would choose is right on this one too."""
    monkeypatch.setattr(room, "cpu_policy", lambda: policy)
    for inputs in samples("cpu", dtype):
        check_op(lambda *t: linear(*t, impl="aten"), linear_reference, inputs, dtype, f"{policy} {dtype}")


def test_policy_override(monkeypatch):
    monkeypatch.setenv("GPT2_FAST_GEMM", "onednn")
    assert room.cpu_policy.__wrapped__().float32 == "onednn"
    monkeypatch.setenv("GPT2_FAST_GEMM", "blas")
    with pytest.raises(ValueError, match="'blas'; set it to mkl or onednn"):
        room.cpu_policy.__wrapped__()


def test_strided_inputs():
    x, weight = torch.randn(6, 4, 48).transpose(0, 1), torch.randn(33, 48).t()
    check_op(linear, linear_reference, [x, weight, torch.randn(33)], torch.float32)


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_weight_of_nn_linear(library, monkeypatch):
    """Its gradient is laid out as nn.Linear stores it, and autograd keeps that memory."""
    monkeypatch.setattr(room, "cpu_policy", lambda: CpuPolicy(library, False, ""))
    stored, seen = torch.randn(33, 48, requires_grad=True), []
    stored.register_hook(lambda g: seen.append(g.data_ptr()))
    linear(torch.randn(6, 4, 48), stored.t()).sum().backward()
    assert stored.grad.is_contiguous()
    assert stored.grad.data_ptr() == seen[0]


def test_frozen_weight_gets_no_gradient():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, 5)
    y = linear(x, weight, torch.zeros(5))
    (dx,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(dx, weight.sum(1).expand(3, 8))


def test_autocast_casts_everything():
    x, weight, bias = torch.randn(3, 8), torch.randn(8, 5, requires_grad=True), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias)
    expected = x.bfloat16().double() @ weight.bfloat16().double() + bias.bfloat16().double()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-7)
    (dweight,) = torch.autograd.grad(y.float().sum(), [weight])
    assert dweight.dtype == torch.float32


def test_same_bits_twice():
    inputs = [torch.randn(65, 96, requires_grad=True), torch.randn(96, 33, requires_grad=True)]
    runs = [evaluate(linear, inputs, [torch.ones(65, 33)]) for _ in range(2)]
    assert_same_bits([*runs[0][0], *runs[0][1]], [*runs[1][0], *runs[1][1]])


def test_operator_contract():
    x, weight, dy = torch.randn(2, 3, 8), torch.randn(8, 5), torch.randn(2, 3, 5)
    torch.library.opcheck(torch.ops.gpt2_fast.linear.default, (x, weight, torch.randn(5)))
    for layout in (weight, weight.t().contiguous().t()):
        torch.library.opcheck(torch.ops.gpt2_fast.linear_backward.default, (dy, x, layout, True, True, True))


def test_compiles_whole():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, 5, requires_grad=True)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    upstream = [torch.randn(3, 5)]
    torch.testing.assert_close(evaluate(compiled, [x, weight], upstream), evaluate(linear, [x, weight], upstream))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x ends in 8 and weight is \(5, 8\)"):
        linear(torch.randn(3, 8), torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"bias is \(4,\)"):
        linear(torch.randn(3, 8), torch.randn(8, 5), torch.randn(4))
    with pytest.raises(ValueError, match="weight is torch.float32 on cpu and x torch.bfloat16"):
        linear(torch.randn(3, 8).bfloat16(), torch.randn(8, 5))
