"""retain_memory: freed blocks are handed out again instead of being mapped anew."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from numerics import assert_same_bits

from gpt2_fast.ops.runtime import buffers, memory
from gpt2_fast.ops.runtime.cpu_policy import CpuPolicy
from gpt2_fast.ops.runtime.products import product

FAULTS = """
import resource, torch
from gpt2_fast import retain_memory
def step():  # what a training step does: many blocks, all freed before the next one
    return len([torch.ones(n << 20) for n in (9, 16, 12, 10)])
def faults():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without = faults()
retain_memory()
print(without, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    without, retained = map(int, done.stdout.split())
    assert retained < 0.5 * without


@pytest.mark.parametrize("bias", [False, True])
def test_the_vendors_products_lie_in_the_region_too(bias, use_policy, monkeypatch):
    """Between blocks of malloc's, holes of theirs stay open and a step holds more than its tensors."""
    use_policy(CpuPolicy("mkl", True, "a test"))
    region = buffers.Region(4 * buffers.SMALLEST)
    monkeypatch.setattr(buffers, "_region", lambda: region)
    monkeypatch.setattr(memory, "retained", False)  # a test of a run may have switched it on
    a, b, c = torch.randn(512, 64), torch.randn(64, 1024), torch.randn(1024) if bias else None
    expected = product(a, b, c)
    monkeypatch.setattr(memory, "retained", True)
    result = product(a, b, c)
    assert_same_bits(result, expected)
    assert region.holes[0][0] == result.numel() * 4
