"""add_layernorm: every implementation against float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from numerics import DTYPES, assert_same_bits, check_op, evaluate

from gpt2_fast.ops.add_layernorm import add_layernorm, add_layernorm_reference, samples
from gpt2_fast.ops.runtime import philox
from gpt2_fast.ops.runtime.dispatch import ImplementationUnavailable

IMPLS = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]


def _check(inputs, options, dtype, impl):
    def run(*tensors):
        return add_layernorm(*tensors, **options, impl=impl)

    def reference(*tensors):
        return add_layernorm_reference(*tensors, **options)

    check_op(run, reference, inputs, dtype, f"{impl} {dtype} {tuple(inputs[0].shape)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients(impl, dtype):
    for *inputs, options in samples(DEVICE, dtype):
        _check(inputs, options, dtype, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    for *inputs, options in samples("cpu", dtype):
        _check(inputs, options, dtype, "cpp")


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


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_drops_the_reference_mask(impl):
    x = torch.ones(37, 100, device=DEVICE)
    residual, weight = torch.zeros_like(x), torch.ones(100, device=DEVICE)
    rng = torch.tensor([-987654321012345], device=DEVICE)
    _, h = add_layernorm(x, residual, weight, torch.zeros_like(weight), dropout_p=0.3, rng=rng, site=7, impl=impl)
    keep = philox.keep_rows(rng, 7, 37, 100, 0.3)
    assert torch.equal(h != 0, keep)
    torch.testing.assert_close(h[keep], torch.full_like(h[keep], philox.scale(0.3)))


def test_strided_inputs():
    x = torch.randn(6, 4, 48).transpose(0, 1)
    _check([x, torch.randn(4, 6, 96)[..., ::2], torch.randn(48), torch.randn(48)], {}, torch.float32, "cpp")


def test_same_bits_whatever_the_threads(threads):
    inputs = [torch.randn(257, 96, requires_grad=True) for _ in range(2)]
    inputs += [torch.randn(96, requires_grad=True) for _ in range(2)]
    rng, upstream = torch.tensor([5]), [torch.randn(257, 96) for _ in range(2)]
    runs = []
    for count in (2, 1, 2):
        threads(count)
        outputs, gradients = evaluate(
            lambda *t: add_layernorm(*t, dropout_p=0.1, rng=rng, impl="cpp"), inputs, upstream
        )
        runs.append([*outputs, *gradients])
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


def test_operator_contract():
    x, residual, weight, bias = torch.randn(3, 96), torch.randn(3, 96), torch.randn(96), torch.randn(96)
    arguments = (x, residual, weight, bias, 1e-5, 0.1, torch.tensor([5]), 1, torch.float32, "cpp")
    torch.library.opcheck(torch.ops.gpt2_fast.add_layernorm.default, arguments)
    torch.library.opcheck(
        torch.ops.gpt2_fast.add_layernorm_backward.default,
        (x, residual, x, weight, torch.randn(3), torch.rand(3), 0.1, torch.tensor([5]), 1, torch.float32, True, "cpp"),
    )


def test_compiles_whole():
    def step(x, residual, weight, bias):
        y, h = add_layernorm(x, residual, weight, bias)
        return (y * h).sum()

    inputs = [torch.randn(3, 96, requires_grad=True), torch.randn(3, 96, requires_grad=True)]
    inputs += [torch.randn(96, requires_grad=True) for _ in range(2)]
    one = [torch.ones(())]
    expected, gradients = evaluate(step, inputs, one)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(evaluate(compiled, inputs, one), (expected, gradients))


def test_bad_input_is_named():
    x, weight = torch.randn(3, 96), torch.randn(96)
    with pytest.raises(ValueError, match=r"residual is \(3, 95\) and x is \(3, 96\)"):
        add_layernorm(x, torch.randn(3, 95), weight, weight)
    with pytest.raises(ValueError, match="residual must be float32 or x's dtype"):
        add_layernorm(x, x.bfloat16(), weight, weight)
    with pytest.raises(ValueError, match=r"weight is \(95,\)"):
        add_layernorm(x, x, weight[:-1], weight)
    with pytest.raises(ValueError, match="dropout_p is 1.0"):
        add_layernorm(x, x, weight, weight, dropout_p=1.0)
    with pytest.raises(ValueError, match="rng is None"):
        add_layernorm(x, x, weight, weight, dropout_p=0.1)
    with pytest.raises(ValueError, match="choose auto, cpp, reference, triton"):
        add_layernorm(x, x, weight, weight, impl="cuda")
    with pytest.raises(ImplementationUnavailable, match=r"not torch.float64; use impl='reference'"):
        add_layernorm(x.double(), x.double(), weight.double(), weight.double(), impl="cpp")
