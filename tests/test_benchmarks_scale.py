"""`python -m benchmarks scale` runs, its numbers are what they are called, and SCALE.md is what the script writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import scale, scale_paper  # noqa: E402
from benchmarks.programs import SIZES  # noqa: E402
from benchmarks.roofline import fill  # noqa: E402
from gpt2_fast import GPT2Config  # noqa: E402
from gpt2_fast.config import num_params  # noqa: E402

SMOKE = ("--model", "smoke", "--context", "16", "--rounds", "1", "--warmup", "1", "--steps", "1", "--device", "cpu")


def test_two_processes_beside_one(tmp_path, capsys):
    scale.main([*SMOKE, "--processes", "1,2", "--dropout", "0.1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    (one,), (two,) = record["runs"]["1"], record["runs"]["2"]
    assert one["losses"] == two["losses"]
    assert len(set(one["losses"])) == len(one["losses"]) == 3
    assert one["sent"] == 0
    # Half of the float32 sums goes to the other process, half of the float32 weights comes back; and, of the norm and
    # the losses, some numbers. Buffers are filled up to whole chunks.
    n = num_params(GPT2Config(**SIZES["smoke"]))
    assert 4 * n <= two["sent"] <= 4 * n * 1.5 + 1024
    assert two["state_bytes"] == pytest.approx(one["state_bytes"] / 2, rel=0.3)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("the same bits") == 2
    assert record["machine"]["versions"]["torch"]


def test_losses_that_differ_are_seen():
    run = {"seconds": 1.0, "watched": 1.0, "sent": 0, "waited": 0.0, "sending": 0.0, "peak_bytes": 1, "state_bytes": 1}
    record = {"tokens_per_step": 8, "runs": {"1": [run | {"losses": [1.0]}], "2": [run | {"losses": [1.0 + 2**-52]}]}}
    assert [row[-1] for row in scale.rows(record)] == ["the same bits", "DIFFERENT"]
    record["threads_matter"] = True
    assert [row[-1] for row in scale.rows(record)] == ["the same bits", "other bits: other threads"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--processes", "3"), "--processes has 3; it must be a power of two that divides --grad-accum 4"),
        (("--processes", "8"), "--processes has 8; it must be a power of two that divides --grad-accum 4"),
        (("--processes", "x"), "--processes is 'x'; give numbers above 0, by comma"),
    ],
)
def test_bad_counts(arguments, said):
    with pytest.raises(SystemExit) as stopped:
        scale.main([*SMOKE, *arguments])
    assert str(stopped.value) == said


def test_the_table_on_paper_is_the_scripts():
    document = scale_paper.DOCUMENT.read_text()
    assert fill(document, {"paper": scale_paper.document()}) == document, "run: python -m benchmarks scale --document"


def test_the_measured_table_is_its_records():
    document = scale_paper.DOCUMENT.read_text()
    assert fill(document, {"measured": scale.measured()}) == document, "run: python -m benchmarks scale --document"
