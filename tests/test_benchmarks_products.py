"""`python -m benchmarks products`: the step's matrix products by each library."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import products
from benchmarks.products import Product
from benchmarks.programs import SIZES


def test_the_products_are_a_steps_flops():
    """6 FLOPs for each weight and token: GPT-2's blocks, and its head whatever its chunks are."""
    size, tokens = SIZES["gpt2"], 32 * 1024
    found = products.products_of("gpt2", 32, 1024, "cuda", 2)
    weights = 12 * size["n_layer"] * size["n_embd"] ** 2 + 50257 * size["n_embd"]
    assert sum(p.flops * p.calls for p in found) == pytest.approx(6 * tokens * weights)
    assert all("dW" in p.name or tokens >= p.M for p in found)


@pytest.mark.parametrize(("left", "right"), [(False, False), (True, False), (False, True)])
def test_operands_lie_as_the_step_has_them(left, right):
    a, b = Product("p", 5, 3, 7, 1, left, right).operands(torch.float32, "cpu")
    assert (a.shape, b.shape) == ((5, 3), (3, 7))
    assert (a.is_contiguous(), b.is_contiguous()) == (not left, not right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ways_take_turns_and_are_held_to_float64(dtype, monkeypatch):
    calls, now = [], iter(range(1000))
    real = products.multiply
    monkeypatch.setattr(products, "multiply", lambda way, a, b: (calls.append(way), real(way, a, b))[1])
    wanted = Product("p", 33, 65, 17, 1, right=True)
    found = products.measure_product(wanted, dtype, "cpu", 3, lambda: float(next(now)))
    assert calls == ["own", "vendor"] * 4  # once for the values, then three rounds
    for way in ("own", "vendor"):
        assert found[way]["seconds"] == [1.0, 1.0, 1.0]
        assert 0 < found[way]["error"] < (1e-6 if dtype == torch.float32 else 1e-2)
    monkeypatch.setattr(products, "multiply", lambda way, a, b: real(way, a, b) * (1.01 if way == "own" else 1))
    broken = products.measure_product(wanted, torch.float32, "cpu", 1)
    assert broken["own"]["error"] == pytest.approx(0.01, rel=0.01)
    assert broken["vendor"]["error"] < 1e-6


def test_library_is_given_back(monkeypatch):
    asked = []

    def preferred(way=None):
        asked.append(way)
        return "default"

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    with pytest.raises(RuntimeError, match="asked"), products._library("cublaslt"):
        raise RuntimeError(f"asked {asked}")
    assert asked == [None, "cublaslt", "default"]
    with products._library("own"):
        assert len(asked) == 3


def test_the_command(tmp_path, capsys):
    arguments = ["--model", "smoke", "--device", "cpu", "--batch-size", "2", "--context", "16", "--rounds", "2"]
    assert products.main([*arguments, "--dtype", "float32", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert len(record["rows"]) == 15
    assert "c_fc dW [64, 32] @ [32, 256]" in out
    assert "the faster of each:" in out
    with pytest.raises(SystemExit):
        products.main([*arguments, "--rounds", "0"])
    assert "must be at least 1" in capsys.readouterr().err
