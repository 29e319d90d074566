"""A run goes on where nothing of what it prints can be written."""

# ruff: noqa: F401, F811 - fixtures that are imported

from __future__ import annotations

import errno
import io
import os
import pty
import sys

import pytest
from small_run import data, names, out, small

from gpt2_fast.train import start_run
from gpt2_fast.train.progress import Progress
from gpt2_fast.train.say import say

pytestmark = pytest.mark.usefixtures("blank_pictures")


class Failing(io.TextIOBase):
    """A stream that cannot be written, on a terminal or not."""

    def __init__(self, error: Exception, terminal: bool):
        self.error, self.terminal, self.calls = error, terminal, 0

    def write(self, text):
        self.calls += 1
        raise self.error

    flush = lambda self: self.write("")
    isatty = lambda self: self.terminal


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("number", ["ENOSPC", "EIO", "EPIPE"])
def test_a_stream_that_cannot_be_written_ends_no_run(small, out, monkeypatch, terminal, number):
    code = getattr(errno, number)
    streams = [Failing(OSError(code, os.strerror(code)), terminal) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    start_run(small(steps=3, quiet=False, log_every=1, sample_every=2, eval_every=2)).train()
    assert names(out)[-1] == "checkpoint-000003"
    assert (out / "loss.png").exists()
    assert all(stream.calls for stream in streams)


def test_streams_that_are_none(small, out, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    start_run(small(quiet=False, log_every=1)).train()
    assert names(out) == ["checkpoint-000002"]


def test_nothing_for_stderr_goes_to_stdout(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    say("an error", "stderr")
    say("a path \u2014", "stdout")
    assert capsys.readouterr().out == "a path \u2014\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full")
@pytest.mark.parametrize("streams", ["full", "closed", "pipe"])
def test_a_command_ends_as_it_would(forks, tmp_path, small, out, streams):
    given = small(quiet=False, log_every=1)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "quiet"]
    run = lambda: forks(0, "training_ranks", "train", *flags, cwd=tmp_path, streams=streams)["codes"]
    assert run() == [0]
    assert names(out) == ["checkpoint-000002"]
    assert run() == [2]  # the folder holds a run; this is said in vain


def test_a_bar_goes_on_where_its_terminal_is_gone(monkeypatch):
    master, slave = pty.openpty()
    terminal = open(slave, "w")  # noqa: SIM115 - closing it would fail
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(3, 0, 1) as bar:
        os.close(master)
        for step in (1, 2, 3):
            bar.advance()
            bar.report(step, 1.0, 1e-3, 10.0)
            bar.write("a line", "stderr")
    assert bar._bar.n == 3
    with pytest.raises(OSError, match="Input/output"):
        terminal.close()
