"""Tensors of more than 2^31 elements: what a kernel writes at their end is what it writes for their end alone."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

LIMIT = 2**31
pytestmark = pytest.mark.skipif(
    DEVICE != "cuda" or torch.cuda.get_device_properties(0).total_memory < 60 << 30,
    reason="needs a GPU of 60 GB: the least tensor with such offsets is 4 GB, and an op takes several",
)


@pytest.fixture(autouse=True)
def _unpoisoned():
    """Filling gigabytes with NaN is not what is tested here, and the allocator's cache is given back."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.cuda.empty_cache()


def _randn(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, device=DEVICE, dtype=dtype).normal_()


def _same(whole, end):
    assert torch.equal(whole, end), f"they differ by up to {(whole.float() - end.float()).abs().max().item()}"


def test_attention():
    from gpt2_fast.kernels import attention

    T, H, D = 1024, 12, 64
    qkv = _randn(LIMIT // (T * 3 * H * D) + 2, T, 3, H, D)
    dout = _randn(qkv.shape[0], T, H, D)
    out, lse = attention.forward(qkv, 0.125)
    dqkv = attention.backward(dout, qkv, out, lse, 0.125)
    end = (qkv[-1:].contiguous(), *attention.forward(qkv[-1:].contiguous(), 0.125))
    _same(out[-1:], end[1])
    _same(dqkv[-1:], attention.backward(dout[-1:].contiguous(), *end, 0.125))


def test_rows():
    from gpt2_fast.kernels import add_layernorm, bias

    x, residual = _randn(LIMIT // 768 + 1000, 768), _randn(LIMIT // 768 + 1000, 768)
    weight, offset = _randn(768), _randn(768)
    options = (1e-5, 0.1, torch.tensor([7], device=DEVICE), 3, torch.bfloat16)
    y, h, mean, rstd = add_layernorm.forward(x, residual, weight, offset, *options)
    _same(add_layernorm.normalize(h, weight, offset, mean, rstd, y.dtype)[-500:], y[-500:])
    dx, dresidual, *_ = add_layernorm.backward(x, y, h, weight, mean, rstd, 0.0, None, 3, torch.float32, True)
    one = [t[-500:].contiguous() for t in (x, y, h)]
    got = add_layernorm.backward(*one, weight, mean[-500:], rstd[-500:], 0.0, None, 3, torch.float32, True)
    _same(dx[-500:], got[0])
    _same(dresidual[-500:], got[1])
    x[:-500] = 0
    torch.testing.assert_close(bias.column_sum(x), x[-500:].float().sum(0), rtol=1e-4, atol=1e-3)


def test_gelu():
    from gpt2_fast.kernels import mlp as kernel

    u = _randn(LIMIT // 3072 + 1000, 3072)
    _same(kernel.gelu_forward(u, False)[-500:], kernel.gelu_forward(u[-500:].contiguous(), False))
    _same(kernel.gelu_backward(u, u, False)[0][-500:], kernel.gelu_backward(*[u[-500:].contiguous()] * 2, False)[0])


def test_logits():
    from gpt2_fast.kernels.linear_cross_entropy import softmax_xent_

    rows, vocabulary = LIMIT // 50304 + 100, 50257
    padded = _randn(rows, 50304)
    logits, end = padded[:, :vocabulary], padded[-50:].clone()[:, :vocabulary]
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    scale = torch.full((1,), 3.0, device=DEVICE)
    found = []
    for part, target in ((logits, labels), (end, labels[-50:])):
        losses = torch.empty(part.shape[0], device=DEVICE)
        softmax_xent_(part, target, losses, -100, scale, True)
        found.append((losses[-50:], part[-50:]))
    for whole, alone in zip(*found, strict=True):
        _same(whole, alone)


def test_optimizer():
    """A parameter beyond 2^31 numbers, moved by gradients that are 0 but at its end."""
    from gpt2_fast.optim import AdamW

    parameter = torch.nn.Parameter(torch.ones(LIMIT + 1024, device=DEVICE, dtype=torch.bfloat16))
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[-1] = 1.0
    AdamW([parameter], lr=0.5, weight_decay=0.0).step()
    assert parameter[-1].item() == 0.5
    assert parameter[:-1].min().item() == parameter[:-1].max().item() == 1.0
