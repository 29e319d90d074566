"""retain_memory: freed blocks are handed out again instead of being mapped anew."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from gpt2_fast import retain_memory
retain_memory() if {retain} else None
def step():  # what a training step does: many blocks, all freed before the next one
    return len([torch.ones(n << 20) for n in (9, 16, 12, 10)])
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(retain: bool) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(retain=retain)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    assert _faults(retain=True) < 0.5 * _faults(retain=False)
