"""A run's data: that of validation is held to what it was, and what breaks in the middle costs no step."""

# ruff: noqa: F401, F811 - fixtures that are imported

from __future__ import annotations

import os

import pytest
from small_run import data, names, numbers, out, small

from gpt2_fast.checkpoint.run_folder import load_checkpoint
from gpt2_fast.train import resume_run, start_run

pytestmark = pytest.mark.usefixtures("blank_pictures")


def best_of(out):
    return load_checkpoint(out)[0].extra["best_step"]


def test_validation_data_that_was_replaced_is_refused(small, data, out):
    start_run(small(eval_every=1)).train()
    numbers(data / "val.bin", 400, seed=9)
    with pytest.raises(ValueError, match=f"--data {data} holds other validation tokens than when the run was saved"):
        resume_run(str(out), {"steps": 3})


@pytest.mark.parametrize("what", ["data", "eval_batches"])
def test_the_best_is_found_anew_on_other_validation_data(small, data, out, tmp_path, capsys, what):
    """Losses of before are lower than any after: they do not count."""
    run = start_run(small(steps=2, eval_every=1))
    run.validate = lambda: run.validated.setdefault(run.step, 1.0 if run.step else 2.0)
    run.train()
    assert best_of(out) == 1
    more = {"eval_batches": 3}
    if what == "data":
        (tmp_path / "other").mkdir()
        numbers(tmp_path / "other" / "train.bin")
        numbers(tmp_path / "other" / "val.bin", 400, seed=9)
        more = {"data": str(tmp_path / "other")}
    run = resume_run(str(out), {"steps": 4, "quiet": False, **more})
    assert "its best checkpoint is found anew" in capsys.readouterr().out
    run.train()
    assert best_of(out) in (2, 3, 4)
    assert load_checkpoint(out)[0].extra["best"] > 2.0
    assert os.readlink(out / "checkpoint-best").startswith(f"checkpoint-00000{best_of(out)}")


def test_as_many_windows_of_the_same_data_are_compared(small, out, capsys):
    """val.bin has 24 windows of 16 tokens."""
    start_run(small(eval_batches=12)).train()
    resume_run(str(out), {"eval_batches": 50, "steps": 3, "quiet": False}).train()
    assert "found anew" not in capsys.readouterr().out


def test_processes_with_other_validation_data_are_refused(forks, small, data, tmp_path):
    given = small(grad_accum=2)
    given["data"] = "data"  # of each process's own folder
    for rank, seed in enumerate((1, 2)):
        (tmp_path / f"rank{rank}" / "data").mkdir(parents=True)
        numbers(tmp_path / f"rank{rank}" / "data" / "train.bin")
        numbers(tmp_path / f"rank{rank}" / "data" / "val.bin", 400, seed=seed)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "quiet"]
    done = forks(2, "training_ranks", "train", *flags, cwd=tmp_path, folders=["rank0", "rank1"])
    assert done["codes"] == [2, 2]
    assert "the processes read other validation data; is --data data the same everywhere?" in "".join(done["stderr"])
