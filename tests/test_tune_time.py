"""Timing candidates on a GPU, with the card's clock made up: what is wrong is out, what is slow too, nothing twice."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gpt2_fast.kernels import tuning

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import tune_time  # noqa: E402
from benchmarks.ops.harness import Case  # noqa: E402

SHIPPED, FASTER, FASTEST, BROKEN = 4, 2, 1, 16  # warps


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A table of one op, of which a row for GPT-2's width stands last."""
    rows = [
        {"kernel": "k", "itemsize": 4, "config": {"num_warps": SHIPPED}},
        {"kernel": "k", "itemsize": 2, "shape": {"width": 8192}, "config": {"num_warps": SHIPPED}},
        {"kernel": "k", "itemsize": 2, "shape": {"width": 768}, "config": {"num_warps": SHIPPED}},
    ]
    (tmp_path / "toy.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    for cache in (tuning.rows, tuning._row):
        cache.cache_clear()
    yield [("toy", 0), ("toy", 1), ("toy", 2)]
    monkeypatch.undo()
    for cache in (tuning.rows, tuning._row):
        cache.cache_clear()


def _warps(index: int) -> int:
    return tuning.rows("toy")[index]["config"]["num_warps"]


def _case(index: int, wrong: tuple[int, ...] = ()) -> Case:
    """x * 3, which with some numbers of warps is off by a hundredth, and with 32 does not launch."""

    def run(x):
        if _warps(index) == 32:
            raise RuntimeError("out of resource: shared memory\nand more")
        return x * (3.03 if _warps(index) in wrong else 3)

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    return Case("[4, 8]", (x,), {"gpt2_fast": run, "eager": lambda x: x * 3}, {"forward": {"bytes": 1, "flops": 1}})


def _configs(*warps: int) -> list[dict]:
    return [{"num_warps": n} for n in warps]


def _clock(index: int, ms: dict[int, float]):
    def bench(run):
        run()
        return ms[_warps(index)]

    return bench


@pytest.mark.parametrize(
    ("ms", "wrong", "first"),
    [
        ({SHIPPED: 1.0, FASTER: 0.8, FASTEST: 0.5}, (), FASTEST),
        ({SHIPPED: 1.0, FASTER: 0.8, FASTEST: 0.5}, (FASTEST,), FASTER),
        ({SHIPPED: 1.0, FASTER: 0.995, FASTEST: 1.2}, (), SHIPPED),  # less than 1% is noise
        ({SHIPPED: 1.0, FASTER: 0.8, FASTEST: 0.5}, (SHIPPED, FASTEST), FASTER),
    ],
)
def test_the_fastest_that_is_right_wins(toy, ms, wrong, first):
    tried = _configs(SHIPPED, FASTER, FASTEST, 32)
    found = tune_time.by_time("toy", 2, tried, _clock(2, ms), _case(2, wrong), "forward")
    assert found[0]["config"] == {"num_warps": first}
    assert not found[0]["wrong"]
    by_warps = {r["config"]["num_warps"]: r for r in found}
    assert "out of resource: shared memory" in by_warps[32]["wrong"]
    assert "and more" not in by_warps[32]["wrong"]
    for warps in (SHIPPED, FASTER, FASTEST):
        assert bool(by_warps[warps]["wrong"]) == (warps in wrong)
        assert by_warps[warps]["ms"] == (math.inf if warps in wrong else ms[warps])
        expected = 0.01 if warps in wrong else 0.0
        assert by_warps[warps]["error"] == pytest.approx(expected, abs=1e-6)
    assert _warps(2) == SHIPPED  # a trial is over


def test_gpt2s_rows_come_first_and_none_is_timed_twice(toy, tmp_path):
    """Cut off after its first row, then run again with the record."""
    path, timed = tmp_path / "record.json", []

    def cases(op, row):
        timed.append(row.get("shape", {}).get("width"))
        return _case(tuning.rows(op).index(row)), "forward"

    def bench(run):
        run()
        warps = [_warps(i) for i in range(3)]
        return 0.5 if FASTER in warps else 1.0

    go = lambda seconds: tune_time.time_rows(
        toy, tune_time.Record(str(path), "c"), seconds, lambda op, row: _configs(SHIPPED, FASTER), bench, cases
    )
    chosen, left = go(-1.0)
    assert (chosen, len(left), timed) == ({}, 3, [])
    record = tune_time.Record(str(path), "c")
    row = tuning.rows("toy")[2]
    record.add(tune_time.key("toy", row), [{"config": {"num_warps": 8}, "ms": 0.1, "error": 0.0, "wrong": ""}])
    chosen, left = go(60.0)
    assert left == []
    assert timed == [8192, None]
    assert chosen == {("toy", 2): {"num_warps": 8}, **{("toy", i): {"num_warps": FASTER} for i in (0, 1)}}
    timed.clear()
    assert go(60.0) == (chosen, [])
    assert timed == []


def test_where_nothing_is_right_nothing_is_chosen(toy, tmp_path, capsys):
    cases = lambda op, row: (_case(0, (SHIPPED, BROKEN)), "forward")
    record = tune_time.Record(str(tmp_path / "r.json"), "c")
    tried = lambda op, row: _configs(SHIPPED, BROKEN)
    assert tune_time.time_rows(toy[:1], record, 60, tried, _clock(0, {}), cases) == ({}, [])
    assert "error" in capsys.readouterr().out
    (results,) = json.loads((tmp_path / "r.json").read_text())["rows"].values()
    assert [r["ms"] for r in results] == [None, None]


def test_a_record_of_another_triton_is_refused(tmp_path):
    path = tmp_path / "r.json"
    tune_time.Record(str(path), "c").add("row", [])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"triton": "1.0"}))
    with pytest.raises(SystemExit, match=r"r.json is of 1.0, this is .*; give another --record"):
        tune_time.Record(str(path), "c")


@pytest.mark.parametrize(
    "op", ["attention", "add_layernorm", "mlp", "linear_gelu", "linear_cross_entropy", "bias", "adamw"]
)
def test_every_kernel_has_a_case_that_runs(op):
    """On a CPU, where other code answers: the shapes, the directions and the gradients that are asked for exist."""
    for kernel in dict.fromkeys(row["kernel"] for row in tuning.rows(op)):
        row = next(row for row in tuning.rows(op) if row["kernel"] == kernel)
        case, direction = tune_time.case_of(op, {**row, "shape": {}}, "cpu")
        wrong, error, before = tune_time.checked(case, torch.float32, None)
        assert wrong == ""
        assert (error is None) == (case.check is not None)
        assert error is None or error < 1e-4
        assert tune_time.checked(case, torch.float32, before)[:2] == ("", error)
        run = tune_time.target_of(case, direction)
        run(), run()
