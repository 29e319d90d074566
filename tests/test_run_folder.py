"""What is in --out: a user's own files stay, and a run writes to its own folder alone."""

# ruff: noqa: F401, F811 - fixtures that are imported

from __future__ import annotations

import json
import os
import shutil

import pytest
from small_run import data, names, numbers, out, small

from gpt2_fast.cli import main
from gpt2_fast.train import loop, resume_run, start_run, trackers
from gpt2_fast.train.place import Place

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-best", "checkpoint/notes.txt", "loss.png"])
def test_a_users_file_is_refused_before_anything_starts(small, out, name):
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match="would replace it; move it, or choose another --out"):
        start_run(small())
    assert sorted(out.rglob("*")) == before
    assert path.read_text() == "mine"


def test_a_users_file_stays_when_a_run_goes_on(small, out, capsys):
    """Also one that appears while the run is at work: its checkpoints are saved, and none is removed."""
    run = start_run(small(steps=4, save_every=1, keep=1))
    (out / "checkpoint").write_text("mine")
    with pytest.raises(OSError, match=r"checkpoint is not this run's and stays as it is; .*checkpoint-000004 is saved"):
        run.train()
    assert names(out) == [f"checkpoint-{step:06d}" for step in (1, 2, 3, 4)]
    assert main(["train", "--resume", str(out)]) == 2
    assert f"{out / 'checkpoint'} is not a run's" in capsys.readouterr().err
    assert (out / "checkpoint").read_text() == "mine"
    (out / "checkpoint").rename(out / "mine")
    assert main(["train", "--resume", str(out), "--steps", "5"]) == 0
    assert names(out) == ["checkpoint-000005"]


def test_a_copy_that_followed_the_links_is_a_runs_still(small, out):
    start_run(small()).train()
    target = out / os.readlink(out / "checkpoint")
    (out / "checkpoint").unlink()
    shutil.copytree(target, out / "checkpoint")
    resume_run(str(out), {"steps": 3}).train()
    assert os.readlink(out / "checkpoint") == "checkpoint-000003"


def test_a_run_that_came_and_went_meanwhile_is_not_written_over(small, out, monkeypatch):
    """Between the first look at the folder and the lock, as another reads long data."""

    load = loop.load_data

    def late(*arguments, **more):
        monkeypatch.setattr(loop, "load_data", load)
        start_run(small()).train()
        late.left = contents(out)
        return load(*arguments, **more)

    monkeypatch.setattr(loop, "load_data", late)
    with pytest.raises(ValueError, match=f"holds a run already; continue it with --resume {out}"):
        start_run(small(steps=4))
    assert contents(out) == late.left


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def at_step(run, step, do):
    """Calls `do` before a run takes this step."""
    take = run.run_step

    def call(*arguments):
        if run.step == step:
            do()
        return take(*arguments)

    run.run_step = call


def logged(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_folder_that_is_gone_is_made_again(small, out, capsys, how):
    run = start_run(small(steps=5))
    at_step(run, 2, lambda: out.rename(out.with_name("moved")) if how == "moved" else shutil.rmtree(out))
    run.train()
    said = [line for line in capsys.readouterr().err.splitlines() if "made again" in line]
    assert said == [f"{out} was moved away or removed: it is made again, and the run saves there"]
    assert names(out) == ["checkpoint-000003", "checkpoint-000005"]  # as soon as it is noticed, and at the end
    assert logged(out) == [2, 3, 4, 5, 5]
    resume_run(str(out), {"steps": 6}).train()
    assert names(out)[-1] == "checkpoint-000006"


@pytest.mark.parametrize("running", [True, False])
def test_a_folder_that_is_another_runs_is_left_alone(small, out, running):
    """Another run took the name, and is at work or done. This one saves beside it."""
    run = start_run(small(steps=5, seed=1))

    def replace():
        out.rename(out.with_name("moved"))
        replace.other = start_run(small(save_every=1))
        replace.other.save() if running else replace.other.train()
        replace.left = contents(out)

    at_step(run, 2, replace)
    message = f"--out {out} is another run's by now; step 3 is saved, go on with --resume {out}-2$"
    with pytest.raises(ValueError, match=message):
        run.train()
    assert contents(out) == replace.left
    replace.other.home.lock.release()
    beside = out.with_name("run-2")
    assert names(beside) == ["checkpoint-000003"]
    assert logged(out.with_name("moved")) == [0, 1]
    resume_run(str(beside), {}).train()
    assert logged(beside) == [2, 3, 4, 5, 5]


def test_a_lock_that_was_removed_is_taken_again(small, out, capsys):
    run = start_run(small(steps=3))
    at_step(run, 1, (out / ".lock").unlink)
    run.train()
    assert logged(out) == [0, 1, 2, 3, 3]
    assert (out / ".lock").exists()
    assert "made again" not in capsys.readouterr().err


@pytest.mark.parametrize("why", ["options", "data", "device"])
def test_a_refused_run_lets_its_folder_go(small, data, out, why):
    """Also where the error is kept, as a notebook keeps the last one, and all that it came through."""
    start_run(small()).train()
    given = {"options": {"model": "gpt2-medium"}, "data": {"steps": 3}, "device": {"compile_graph": True}}[why]
    if why == "data":
        numbers(data / "train.bin", seed=2)
    with pytest.raises(ValueError, match="cannot change|holds other tokens|needs a CUDA device") as kept:
        resume_run(str(out), given)
    numbers(data / "train.bin")
    resume_run(str(out), {"steps": 3}).train()
    assert names(out)[-1] == "checkpoint-000003"
    assert kept.value.__traceback__ is not None


def test_a_refused_new_run_lets_its_folder_go(small, out):
    with pytest.raises(ValueError, match="needs a CUDA device") as kept:
        start_run(small(compile_graph=True))
    start_run(small()).train()
    assert names(out) == ["checkpoint-000002"]
    assert kept.value.__traceback__ is not None


@pytest.mark.parametrize("why", ["data", "device", "log", "tracker"])
def test_a_resume_that_is_refused_changes_nothing(small, data, out, capsys, monkeypatch, why):
    start_run(small(steps=4, save_every=2)).train()
    given = ["train", "--resume", str(out / "checkpoint-000002")]
    if why == "data":
        numbers(data / "train.bin", seed=2)
    elif why == "device":
        given.append("--compile-graph")
    elif why == "log":
        lines = (out / "metrics.jsonl").read_text().splitlines()
        (out / "metrics.jsonl").write_text("\n".join(["{", *lines]) + "\n")
    else:
        (out / "tensorboard").write_text("a file")
        monkeypatch.setitem(trackers.KINDS, "tensorboard", lambda *_: (out / "tensorboard").mkdir())
        monkeypatch.setattr(trackers, "check_installed", lambda config: None)
        monkeypatch.setattr(loop, "check_installed", lambda config: None)
        given += ["--log", "tensorboard"]
    before = contents(out)
    assert main(given) == 2
    said = {"data": "holds other tokens", "device": "needs a CUDA device", "log": "damaged at line 1",
            "tracker": "--log tensorboard cannot be opened"}  # fmt: skip
    assert said[why] in capsys.readouterr().err
    assert contents(out) == before


def test_a_tracker_that_cannot_be_closed_holds_no_folder(small, out, monkeypatch):
    run = start_run(small())

    def close():
        raise OSError("no network")

    monkeypatch.setattr(run.home.trackers, "close", close)
    with pytest.raises(OSError, match="no network"):
        run._leave()
    Place(out, new=False).release()
