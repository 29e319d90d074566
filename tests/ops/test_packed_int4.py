"""int4: the levels, the scales, how they lie in memory, and products with them against float64."""

from __future__ import annotations

import pytest
import torch

from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.generate.decoders import parameters_of
from gpt2_fast.ops import packed_int4
from gpt2_fast.ops.packed_int4 import GROUP, LEVELS, quantised
from gpt2_fast.ops.packed_model import PackedCache, PackedModel
from gpt2_fast.ops.packed_weights import PANEL, HugePages, PackedMatrix


def _meant(matrix: torch.Tensor) -> torch.Tensor:
    return PackedMatrix(matrix, "int4", memory=HugePages()).dequantised(torch.float64)


def _group_errors(meant: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """[N, K / 32]: the root of the squared error of each group, as a part of the group's own."""
    split = lambda t: t.double().unflatten(1, (-1, GROUP)).norm(dim=2)
    return split(meant - matrix) / split(matrix)


@pytest.mark.parametrize(("N", "K"), [(1, 32), (16, 64), (21, 96), (37, 160)])
def test_panels_mean_what_was_quantised(N, K):
    """Byte by byte, from the layout that csrc/decode_int4.h describes."""
    matrix = torch.randn(N, K)
    codes, scales = quantised(matrix)
    panels = PackedMatrix(matrix, "int4", memory=HugePages()).panels
    assert panels.shape == (-(-N // PANEL), -(-K // 64) + K // 8, 64)
    expected = torch.zeros(len(panels) * PANEL, K, dtype=torch.float64)
    for n in range(expected.shape[0]):
        for k in range(K):
            pair, odd = divmod(k // GROUP, 2)
            first = pair * 9
            byte = int(panels[n // PANEL, first + 1 + odd * 4 + k % GROUP // 8, n % PANEL * 4 + k % 4])
            scale = panels[n // PANEL, first].view(torch.bfloat16)[odd * PANEL + n % PANEL]
            expected[n, k] = LEVELS[byte & 15 if k % 8 < 4 else byte >> 4].double() * scale.double()
    meant = LEVELS.double()[codes.long()] * scales.double().repeat_interleave(GROUP, 1)
    assert torch.equal(expected[:N], meant)
    assert not expected[N:].any()
    assert torch.equal(_meant(matrix), meant)


@pytest.mark.parametrize("K", [32, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_strides_and_dtype(K, dtype):
    matrix = torch.randn(21, K, dtype=dtype)
    expected = quantised(matrix.float())
    for same in (matrix, matrix.t().contiguous().t(), torch.stack([matrix, matrix + 1], 2)[..., 0]):
        for a, b in zip(quantised(same), expected, strict=True):
            assert torch.equal(a, b)


def test_codes_are_the_nearest_levels_and_scales_have_the_room_of_float32():
    matrix = torch.randn(61, 96) * torch.logspace(-30, 30, 61).unsqueeze(1)
    codes, scales = quantised(matrix)
    by_scale = matrix.double().unflatten(1, (-1, GROUP)) / scales.double().unsqueeze(2)
    distances = (by_scale.unsqueeze(3) - LEVELS.double()).abs()  # [N, K / 32, 32, 16]
    chosen = distances.gather(3, codes.long().view_as(by_scale).unsqueeze(3)).squeeze(3)
    assert ((chosen - distances.amin(3)).abs() < 1e-4).all()
    assert _group_errors(_meant(matrix), matrix).max() < 0.12


def test_levels_are_lloyds_for_normal_numbers():
    """Each level is the mean of what is rounded to it, and the error is below that of evenly spaced levels."""
    matrix = torch.randn(4000, 320)
    codes, scales = quantised(matrix)
    scale = scales.float().repeat_interleave(GROUP, 1)
    weight = scale.square()
    sums, weights = (
        torch.zeros(16).index_add_(0, codes.flatten().long(), t.flatten()) for t in (matrix * scale, weight)
    )
    assert (sums / weights - LEVELS).abs().max() < 2.5  # neighbouring levels are 11 apart at least
    even = matrix.unflatten(1, (-1, GROUP))
    step = (even.abs().amax(2, keepdim=True) / 7.5).bfloat16()
    even = ((even / step - 0.5).round().clamp(-8, 7) + 0.5) * step
    errors = [(meant - matrix).square().mean().sqrt().item() for meant in (_meant(matrix), even.flatten(1))]
    assert errors[0] < 0.077
    assert errors[0] < 0.9 * errors[1]


def test_zero_and_what_is_not_finite():
    matrix = torch.randn(5, 64)
    matrix[0] = 0
    matrix[1, 3], matrix[2, 40], matrix[3, 0] = torch.inf, -torch.inf, torch.nan
    meant = _meant(matrix)
    assert not meant[0].any()
    for row, group in ((1, 0), (2, 1), (3, 0)):
        assert not meant[row].unflatten(0, (2, GROUP))[group].isfinite().any()
        assert meant[row].unflatten(0, (2, GROUP))[1 - group].isfinite().all()


def _model(**sizes) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(GPT2Config(n_positions=32, initializer_range=0.1, **sizes), impl="reference").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                p += 0.1 * torch.randn_like(p)
    return model


def test_logits_of_every_batch_size(decode_isa, threads):
    """Of one to thirteen rows, with widths of an odd number of groups and outputs that fill no panel."""
    threads(1)
    sizes = {"n_layer": 1, "n_embd": 96, "n_head": 3, "n_inner": 160, "vocab_size": 301}
    model = _model(**sizes)
    packed = PackedModel(parameters_of(model), "int4", impl="cpp")
    truth = PackedModel(parameters_of(model), "int4", impl="reference", dtype=torch.float64)
    for B in (1, 2, 3, 5, 8, 13):
        tokens = torch.randint(301, (B, 5))
        run = lambda p, tokens=tokens, B=B: p.prefill(tokens, PackedCache(p, B, 5)).double()
        expected = run(truth)
        # Keys and values are bfloat16, and activations have 15 bits.
        assert ((run(packed) - expected).norm(dim=1) < 2e-3 * expected.norm(dim=1)).all(), B


def test_bytes_and_widths():
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 320}
    packed = {w: PackedModel(parameters_of(_model(**sizes)), w) for w in ("float32", "int4")}
    matrices = 320 * 64 + 2 * 64 * (3 * 64 + 64 + 8 * 64)
    assert packed["float32"].nbytes - packed["int4"].nbytes == matrices * 4 - matrices * 9 // 16
    for wrong, message in [
        ({"n_embd": 80, "n_head": 5}, r"decode_step: n_embd is 80, and int4 packs 32 inputs a group; choose .*int8"),
        ({"n_inner": 100}, r"decode_step: n_inner is 100, and int4 packs 32"),
    ]:
        with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
            PackedModel(parameters_of(_model(**{**sizes, **wrong})), "int4")
    with pytest.raises(ValueError, match="K is 33"):
        PackedMatrix(torch.zeros(4, 33), "int4", memory=HugePages())
    packed_int4.check_inputs("K", 1600)
