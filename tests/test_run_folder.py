"""What is in --out: a user's own files stay, and a run writes to its own folder alone."""

# ruff: noqa: F401, F811 - fixtures that are imported

from __future__ import annotations

import os
import shutil

import pytest
from small_run import data, names, out, small

from gpt2_fast.cli import main
from gpt2_fast.train import resume_run, start_run

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
