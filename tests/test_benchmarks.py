"""The benchmark runs and its numbers parse; no test asserts a speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _run(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_train_in_a_smoke_size(tmp_path):
    sizes = ["--size", "smoke", "--batch", "2", "--context", "16", "--rounds", "1", "--warmup", "1", "--steps", "3"]
    done = _run("train", *sizes, "--programs", "gpt2_fast", "reference", "transformers", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    rows = {row["program"].split()[0]: row for row in record["rows"]}
    assert set(rows) == {"gpt2_fast", "reference", "transformers"}
    for row in rows.values():
        assert len(row["losses"]) == 4
        assert row["losses"] == pytest.approx(rows["transformers"]["losses"], rel=1e-4)
        assert 0 < row["p20"] <= row["tokens_per_second"] <= row["p80"]
    assert rows["transformers"]["ratio"] == 1.0
    assert record["machine"]["versions"]["torch"]
    assert record["command"].startswith("python -m benchmarks train --size smoke")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_unknown_programs_are_named():
    done = _run("train", "--size", "smoke", "--programs", "llama")
    assert done.returncode != 0
    assert "no program 'llama'; choose of gpt2_fast, reference" in done.stderr
