"""Runs that are killed, or see a full or broken disk, go on to the bits of an untouched run; and what breaks is seen.

`python -m tests.faults --kills 200` tries more of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import plans, runs, trials

ROOT = Path(__file__).parent.parent
KILLS = 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and /proc")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return runs.build(tmp_path_factory.mktemp("injector"))


def under(library, folder, code, **variables):
    """A Python process in `folder` with the injector."""
    env = os.environ | {"LD_PRELOAD": str(library), "FAULT_ROOT": str(folder)} | variables
    return subprocess.run([sys.executable, "-S", "-c", code], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def done():
    """What `python -m tests.faults` prints: the calls of a run without a fault, and what became of runs with one."""
    command = [sys.executable, "-m", "tests.faults", "--events", "--kills", str(KILLS)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_faulted_runs_end_with_the_bits_of_an_untouched_one(done):
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"all +{KILLS} +{KILLS} +0", done.stdout), done.stdout


def test_what_is_renamed_was_brought_to_the_disk(done):
    """Otherwise a power cut may leave the new name and none of its content."""
    settled, links, renamed = set(), set(), 0
    for line in done.stdout.splitlines():
        if not line[:1].isdigit() or line.count(" ") < 2:
            continue  # not one of the calls
        _, kind, path = line.split(" ", 2)
        if kind == "fsync":
            settled.add(path)
        elif kind == "write":
            settled.discard(path)
        elif kind == "symlink":
            links.add(path)
        elif kind == "rename":
            source, target = path.split(" -> ")
            if source not in links and not Path(target).name.startswith("."):
                assert source in settled, line
                renamed += 1
    assert renamed


WRITES = "import os; f = os.open('a', os.O_CREAT | os.O_WRONLY); print(os.write(f, b'0123456789')); os.rename('a', 'b')"


@pytest.mark.parametrize(
    ("do", "at", "status", "left"),
    [
        ("kill", 2, -9, {"a": ""}),
        ("kill-after", 2, -9, {"a": "0123456789"}),
        ("torn", 2, -9, {"a": "01234"}),
        ("short", 2, 0, {"b": "01234"}),
        ("enospc", 2, 1, {"a": ""}),
        ("eio", 3, 1, {"a": "0123456789"}),
        ("erofs", 1, 1, {}),
        ("kill", 3, -9, {"a": "0123456789"}),
        ("", 0, 0, {"b": "0123456789"}),
    ],
)
def test_the_injector_does_what_it_is_asked(library, tmp_path, do, at, status, left):
    done = under(library, tmp_path, WRITES, FAULT_DO=do, FAULT_AT=str(at))
    assert done.returncode == status, done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == left
    errors = {"enospc": "No space left", "eio": "Input/output error", "erofs": "Read-only file system"}
    assert errors.get(do, "") in done.stderr


def test_an_error_heals_after_as_many_calls_as_it_lasts(library, tmp_path):
    code = """
import os
f = os.open('a', os.O_CREAT | os.O_WRONLY)
for i in range(6):
    try:
        os.write(f, str(i).encode())
    except OSError as error:
        print(i, error.strerror)
"""
    done = under(library, tmp_path, code, FAULT_ON="write", FAULT_AT="2", FAULT_DO="enospc", FAULT_COUNT="3")
    assert done.stdout.split("\n")[:-1] == [f"{i} No space left on device" for i in (1, 2, 3)]
    assert (tmp_path / "a").read_text() == "045"


def test_the_clock_jumps_and_the_steady_one_stays(library, tmp_path):
    code = "import os, time; a = time.time(), time.monotonic(); os.mkdir('a'); b = time.time(), time.monotonic()\n"
    done = under(library, tmp_path, f"{code}print(b[0] - a[0], b[1] - a[1])",
                 FAULT_AT="1", FAULT_DO="clock", FAULT_CLOCK="-3600")  # fmt: skip
    wall, steady = map(float, done.stdout.split())
    assert -3600.5 < wall < -3599
    assert 0 <= steady < 1


def test_calls_elsewhere_do_not_count(library, tmp_path):
    (tmp_path / "in").mkdir()
    code = f"open({str(tmp_path / 'out')!r}, 'w').write('x'); {WRITES}; os.rename('b', '../c')"
    log = tmp_path / "log"
    done = under(library, tmp_path / "in", code, FAULT_LOG=str(log))
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in log.read_text().splitlines()] == [
        ["1", "open"], ["2", "write"], ["3", "rename"], ["4", "rename"]]  # fmt: skip


def test_every_kind_of_fault_has_its_turn():
    kinds = ("mkdir", "open", "write", "write", "fsync", "rename", "unlink", "symlink", "truncate")
    events = [plans.Event(i, kind, "") for i, kind in enumerate(kinds, start=1)]
    chosen = list(plans.suite(events, 1.0, 200, seed=3))
    assert chosen == list(plans.suite(events, 1.0, 200, seed=3))
    firsts = [several[0] for several in chosen]
    assert {plan.do for plan in firsts} == {*plans.KILLS, *plans.ERRORS, *plans.SIGNALS, "clock"}
    assert {plan.at for plan in firsts if plan.do == "kill"} == set(range(1, len(kinds) + 1))
    assert {plan.at for plan in firsts if plan.do == "torn"} == {3, 4}
    assert any(len(several) > 1 for several in chosen)
    assert plans.Plan(**json.loads(json.dumps(firsts[1].changed()))) == firsts[1]


def test_what_differs_is_seen():
    whole = {"weights": b"1", "training": {"a": torch.ones(3)}, "metrics.jsonl": [{"step": 1, "loss": 2.0}]}
    assert trials.differs(whole, whole) is None
    assert "safetensors" in trials.differs(whole | {"weights": b"2"}, whole)
    assert trials.differs(whole | {"training": {"a": torch.tensor([1, 1, 1 + 1e-7])}}, whole) == "a differs"
    assert "other tensors" in trials.differs(whole | {"training": {}}, whole)
    for records in ([], [{"step": 1, "loss": 2.5}], whole["metrics.jsonl"] * 2):
        assert "metrics.jsonl" in trials.differs(whole | {"metrics.jsonl": records}, whole)


def test_what_a_user_cannot_make_sense_of_is_seen():
    def ended(status, text=""):
        return runs.Ended(status, text, [], 0.0)

    kill, full, term = plans.Plan("kill", 3), plans.Plan("enospc", 3), plans.Plan("SIGTERM", seconds=0.1)
    for plan, end in ((kill, ended(-9)), (full, ended(2, "gpt2-fast: cannot write")), (full, ended(0)),
                      (term, ended(-15)), (term, ended(130))):  # fmt: skip
        assert end.unclear(plan) is None
    for plan, end in (
        (kill, ended(-11)),
        (full, ended(-9)),
        (full, ended(1, "KeyError: 3")),
        (full, ended(2, "usage")),
    ):
        assert end.unclear(plan)


def test_temporary_files_are_seen(tmp_path):
    for name in (".training.pt.0a1b2c3d.tmp", ".tmpAbCdEf", "metrics.jsonl", ".lock"):
        (tmp_path / name).touch()
    assert trials.left_over(tmp_path) == [".tmpAbCdEf", ".training.pt.0a1b2c3d.tmp"]
