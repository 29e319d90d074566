"""A run's data: that of validation is held to what it was, and what breaks in the middle costs no step."""

# ruff: noqa: F401, F811 - fixtures that are imported

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from small_run import data, names, numbers, out, small

from gpt2_fast.checkpoint.run_folder import load_checkpoint, save_checkpoint
from gpt2_fast.train import TrainConfig, checkpoints, resume_run, start_run
from gpt2_fast.train.loop import Run
from gpt2_fast.train.place import Place

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
    run.validate = lambda: run.validation.losses.setdefault(run.step, 1.0 if run.step else 2.0)
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


def rewritten(path):
    """The same size at least, other numbers, a later time."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size - 64)
        file.write(bytes(64))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def cut_short(path):
    os.truncate(path, 64)


def after(steps, happens):
    """A run whose step `steps` is taken before `happens()`."""

    def start(given):
        run = start_run(given)
        take = run._take

        def take_and(batch):
            loss = take(batch)
            if run.step + 1 == steps:
                happens()
            return loss

        run._take = take_and
        return run

    return start


@pytest.mark.parametrize("change", [rewritten, cut_short])
def test_data_that_changes_under_a_run_ends_it_and_costs_no_step(small, data, out, change):
    """Batches are made ahead: those of a few steps are there already."""
    run = after(3, lambda: change(data / "train.bin"))(small(steps=40, save_every=0))
    with pytest.raises(
        ValueError, match=r"train.bin has changed while it was read; .*; step (\d+) is saved, go on"
    ) as end:
        run.train()
    (saved,) = names(out)
    assert 3 <= run.step < 40
    assert saved == f"checkpoint-{run.step:06d}"
    assert f"step {run.step} is saved" in str(end.value)


def test_another_file_under_the_name_changes_nothing(small, data, out):
    """As where two runs write the tokens of one text to the cache."""

    def replaced():
        numbers(data / "new.bin", seed=5)
        os.replace(data / "new.bin", data / "train.bin")

    after(3, replaced)(small(steps=9)).train()
    assert names(out) == ["checkpoint-000009"]


@pytest.mark.parametrize("at", [0, 4])
def test_a_batch_that_cannot_be_read_costs_no_step(small, out, at):
    run = start_run(small(steps=9, save_every=0))
    read = run.train_data.batch

    def batch(step, *args, **options):
        if step == at:
            raise OSError("the disk is on fire")
        return read(step, *args, **options)

    run.train_data.batch = batch
    with pytest.raises(OSError, match="^the disk is on fire" + (f"; step {at} is saved, go on with" if at else "$")):
        run.train()
    assert names(out) == ([f"checkpoint-{at:06d}"] if at else [])


def test_validation_data_that_changes_costs_no_step(small, data, out):
    run = after(2, lambda: rewritten(data / "val.bin"))(small(steps=9, eval_every=4))
    with pytest.raises(ValueError, match=r"val.bin has changed while it was read; .*; step 4 is saved"):
        run.train()
    assert names(out) == ["checkpoint-000004"]


@pytest.mark.parametrize("full", [False, True])
def test_a_batch_that_one_process_cannot_read_ends_all(forks, small, tmp_path, out, full):
    """And all have the step before it: the first writes it, and none says that it is saved before it is."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in small(grad_accum=2, steps=9).items()]
    flags = [flag for flag in flags if not flag.startswith("--quiet")]
    if full:
        (tmp_path / "full").touch()
    done = forks(2, "unreadable_ranks", "train", *flags, cwd=tmp_path)
    assert all(done["codes"])
    said = "".join(done["stderr"])
    if full:
        assert "the disk is on fire; step 4 could not be saved" in said
        assert "no room for a checkpoint" in said
        assert not names(out)
    else:
        assert "the disk is on fire; step 4 is saved, go on with --resume" in said
        assert names(out) == ["checkpoint-000004"]


def test_a_picture_that_cannot_be_drawn_ends_no_run(small, out, monkeypatch, capsys):
    from gpt2_fast.report import figures

    def fails(*_):
        raise RuntimeError("no such backend\nat all")

    monkeypatch.setattr(figures, "save_loss_plot", fails)
    start_run(small(quiet=False)).train()
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "no loss.png: no such backend"
    assert said.out.splitlines()[-1] == str(out / "checkpoint")


def test_a_run_of_before_goes_on_with_the_rates_it_had(small, out):
    """--min-lr was 1e-4 whatever --lr was, and a rate may rise in such a run. What is given now may not."""
    Run(TrainConfig(**small(lr=5e-5, min_lr=1e-4))).train()
    for given in ({"lr": 1e-5}, {"lr": 2e-5, "min_lr": 3e-5}):
        with pytest.raises(ValueError, match="so the rate would rise"):
            resume_run(str(out), given)
    run = resume_run(str(out), {"steps": 3})
    assert (run.config.lr, run.config.min_lr) == (5e-5, 1e-4)
    run.train()


def test_a_run_of_before_on_other_data_finds_its_best_anew(small, data, out, tmp_path, monkeypatch):
    """Its checkpoints do not say what they were validated on; that the training data is another one does."""

    def as_before(folder, *, extra, **state):
        extra.pop("validation")
        save_checkpoint(folder, extra=extra, **state)

    with monkeypatch.context() as earlier:
        earlier.setattr(checkpoints, "save_checkpoint", as_before)
        start_run(small(eval_every=1)).train()
    run = resume_run(str(out), {"steps": 3})
    assert run.checkpoints.best.loss < math.inf
    run._leave()
    (tmp_path / "other").mkdir()
    numbers(tmp_path / "other" / "train.bin", seed=8)
    numbers(tmp_path / "other" / "val.bin", 400, seed=9)
    assert resume_run(str(out), {"steps": 3, "data": str(tmp_path / "other")}).checkpoints.best.loss == math.inf


def test_a_run_that_starts_again_validates_again(small, out):
    """Killed before its first checkpoint: the loss in its log may be of other weights or data."""
    run = start_run(small())
    run.validate()
    run._leave()
    assert resume_run(str(out), {"eval_batches": 1}).validation.losses == {}


def test_a_folder_without_a_name_has_one_beside_it_too(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    place = Place(Path())
    assert place.move() == tmp_path / "run-2"
    place.release()
