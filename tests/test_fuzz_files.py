"""Damaged files of every format are read right or refused in one line that names them; what breaks is seen.

`python -m tests.fuzz_files` reads fifty thousand.
"""

from __future__ import annotations

import json
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz_files import __main__ as command
from fuzz_files import judge, mutate
from fuzz_files.formats import FORMATS

ROOT = Path(__file__).parent.parent
FILES = 400


def test_damaged_files_are_read_right_or_refused_in_one_line():
    arguments = [sys.executable, "-m", "tests.fuzz_files", "--files", str(FILES), "--seed", "11"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    right, refused, other, wrong, unclear, crash = map(
        int, re.search(r"^all((?: +\d+){6})$", done.stdout, re.M)[1].split()
    )
    assert right + refused + other == FILES
    assert refused > FILES / 2
    assert wrong == unclear == crash == 0


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_equal_again_and_damage_changes_it(name, tmp_path):
    read = judge.Judge(tmp_path)
    outcomes = {read(name, seed)[0] for seed in range(12)}
    assert outcomes & {judge.REFUSED, judge.OTHER} or name == "vocab.bpe"  # which is found elsewhere then
    content, sound = read._sound[name]
    folder = tmp_path / str(list(FORMATS).index(name))
    (folder / FORMATS[name].file).write_bytes(content)
    assert judge.same(FORMATS[name].read(folder), sound)
    damages = {FORMATS[name].damage(content, random.Random(seed)) for seed in range(40)}
    assert len(damages) > 20
    assert FORMATS[name].damage(content, random.Random(3)) == FORMATS[name].damage(content, random.Random(3))


def test_what_differs_is_seen():
    state = {"a": torch.ones(3), "b": [1, (2.0, None)]}
    assert judge.same(state, {"a": torch.ones(3), "b": [1, (2.0, None)]})
    for other in ({"a": torch.ones(3)}, state | {"a": torch.ones(3).double()}, state | {"a": torch.ones(4)},
                  state | {"a": torch.tensor([1, 1, 1 + 1e-7])}, state | {"b": [1, [2.0, None]]},
                  state | {"b": [1, (2, None)]}):  # fmt: skip
        assert not judge.same(state, other)


def test_what_is_unclear_is_seen(tmp_path):
    path = tmp_path / "config.json"
    assert judge.refused(ValueError(f"{path} is damaged"), tmp_path)[0] == judge.REFUSED
    assert judge.refused(FileNotFoundError(f"{path} is missing"), tmp_path)[0] == judge.REFUSED
    for error in (ValueError("damaged"), ValueError(f"{path} is\ndamaged"), KeyError(str(path)), MemoryError(str(path)),
                  RecursionError(str(path)), ValueError(f"{path}" + "9" * 5000)):  # fmt: skip
        assert judge.refused(error, tmp_path)[0] == judge.UNCLEAR


def test_a_checksum_that_is_not_looked_at_is_seen(monkeypatch, tmp_path):
    from gpt2_fast.checkpoint import run_folder

    name = "run's model.safetensors"
    read = judge.Judge(tmp_path)
    read(name, 0)
    monkeypatch.setattr(run_folder, "_load", _unchecked)
    assert judge.WRONG in {read(name, seed)[0] for seed in range(60)}


def _unchecked(path):
    from gpt2_fast import checkpoint

    state = checkpoint.load_training_state(path)
    config, model = checkpoint.load_pretrained(path)
    return type(state)(state.step, config, model, state.optimizer, state.rng, state.extra)


def test_a_reader_that_dies_or_takes_the_memory_is_reported_and_the_rest_is_read(monkeypatch, capfd, tmp_path):
    script = tmp_path / "child.py"
    script.write_text("""
import json, os, signal, sys
first, files = (int(sys.argv[sys.argv.index(name) + 1]) for name in ("--first", "--files"))
for i in range(first, files):
    print(json.dumps(["shard", i]), flush=True)
    if i == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    print(json.dumps(["wrong", "taken"] if i == 4 else ["right", ""]), flush=True)
""")
    monkeypatch.setattr(command, "CHILD", [str(script)])
    assert not command.parent(["shard"], 6, 0)
    out = capfd.readouterr().out
    assert "crash (1 times): SIGSEGV\n    python -m tests.fuzz_files --formats shard --one 2" in out
    assert re.search(r"all +4 +0 +0 +1 +0 +1\n", out)


def test_memory_is_limited():
    before = resource.getrlimit(resource.RLIMIT_AS)
    judge.limit_memory()
    try:
        torch.empty(1 << 28, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="memory"):
            torch.empty(1 << 32, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_nothing_that_json_holds_is_out_of_reach():
    value = {"a": [1, {"b": 2}], "c": "x"}
    seen = {mutate._dumps(mutate.change(json.loads(json.dumps(value)), random.Random(seed))) for seed in range(300)}
    for part in (b'"b"', b'"c"', b'"a"'):
        assert any(part not in text for text in seen)
    assert any(b"[" * 1000 in text for text in seen)
