"""Panels that C++ packs beside those of the reference, which the other tests hold to what they mean: the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt2_fast.ops.packed_int4 import GROUP, LEVELS
from gpt2_fast.ops.packed_weights import CODES, PANEL, HugePages, PackedMatrix

SIZES = [(1, 32), (5, 1), (7, 33), (16, 64), (21, 96), (48, 768), (333, 100)]  # N, K


def _packed(matrix: Tensor, weights: str, impl: str) -> PackedMatrix:
    return PackedMatrix(matrix, weights, memory=HugePages(), impl=impl)


def _assert_same(matrix: Tensor, weights: str) -> None:
    ours, theirs = (_packed(matrix, weights, impl) for impl in ("cpp", "reference"))
    N = len(matrix)
    whole = N // PANEL if weights == "int4" else None  # of int4, codes that pad a panel are any: their scale is 0
    assert torch.equal(ours.panels[:whole].view(torch.uint8), theirs.panels[:whole].view(torch.uint8))
    assert torch.equal(ours.dequantised(torch.float64), theirs.dequantised(torch.float64))
    assert (ours.scale is None) == (weights != "int8")
    assert ours.scale is None or torch.equal(ours.scale, theirs.scale)


def _fits(weights: str, K: int) -> bool:
    return weights != "int4" or K % GROUP == 0


@pytest.mark.parametrize("weights", CODES)
def test_every_instruction_set_and_size(isa, weights):
    for N, K in SIZES:
        if _fits(weights, K):
            _assert_same(torch.randn(N, K), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weights", CODES)
def test_any_dtype_and_strides(isa, weights, dtype):
    for N, K in [(21, 96), (33, 64)]:
        m = torch.randn(N, K).to(dtype)
        wider = torch.randn(N + 3, K + 5).to(dtype)
        views = [
            m, m.t().contiguous().t(), torch.stack([m, m + 1], 2)[..., 0], m[:1].expand(N, K), m[:, :1].expand(N, K),
            wider[3:, 5:], wider.t().contiguous().t()[:N, 2 : K + 2], torch._neg_view(m),
        ]  # fmt: skip
        for same in views:
            _assert_same(same, weights)


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-40, 1e-38, 1e-30, 1e30, 7e37])
@pytest.mark.parametrize("weights", CODES)
def test_numbers_of_any_size(isa, weights, scale):
    _assert_same(torch.randn(32, 96) * scale, weights)


@pytest.mark.parametrize("weights", CODES)
def test_between_two_numbers(isa, weights):
    """Ties of every rounding: to even in bfloat16 and int8, between two levels in int4."""
    middles = (LEVELS[1:].float() + LEVELS[:-1].float()) / 2
    row = torch.cat([middles, torch.tensor([127.0]), torch.arange(-8, 8) + 0.5])
    bits = 0x3F80_0000 + 0x8000 * torch.arange(16 * 32, dtype=torch.int32).view(16, 32)
    _assert_same(torch.stack([row.roll(i) * 2.0 ** (i - 7) for i in range(16)]), weights)
    _assert_same(bits.view(torch.float32), weights)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_what_is_not_finite_stays_so(isa, weights):
    matrix = torch.randn(16, 96)
    matrix[1, 3], matrix[2, 40], matrix[3, 0], matrix[4, 95], matrix[4, 94] = (
        torch.inf, -torch.inf, torch.nan, torch.nan, torch.inf
    )  # fmt: skip
    ours, theirs = (_packed(matrix, weights, impl).dequantised(torch.float64) for impl in ("cpp", "reference"))
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    assert torch.equal(ours[finite], theirs[finite])
    assert not finite[torch.arange(1, 5), torch.tensor([3, 40, 0, 95])].any()


def test_bits_on_any_number_of_threads(threads):
    matrix = torch.randn(96, 64)
    for weights in CODES:
        threads(1)
        one = _packed(matrix, weights, "cpp").panels
        threads(3)
        assert torch.equal(_packed(matrix, weights, "cpp").panels, one)
