"""`python -m benchmarks compare`: two states of the package beside one another."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import compare, measure

ROOT = Path(__file__).resolve().parent.parent


def test_a_state_beside_itself(tmp_path, capsys, monkeypatch):
    """Real processes: equal losses. Two processes of a smoke size may differ in speed by any factor."""
    monkeypatch.chdir(ROOT)
    arguments = [
        ".",
        "--smoke",
        "--cases",
        "train float32",
        "--tolerance",
        "0.99",
        "--out",
        str(tmp_path),
    ]
    assert compare.main([*arguments, "--device", "cpu"]) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["failed"] == {}
    assert record["old"] == record["new"]
    cases = ["train float32"]
    assert [row["case"] for row in record["rows"]] == cases
    for row in record["rows"]:
        assert row["results"] == "same"
        assert row["ratio"] == pytest.approx(row["new"][0] / row["old"][0])
    out = capsys.readouterr().out
    assert all(case in out for case in cases)


def _run(speeds: dict[str, float], losses: dict[str, list[float]]):
    """A stand-in for the worker, which is told by its folder's name which side it is."""

    def run_worker(module, options, timeout, env=None, launched=(), root=ROOT):
        tokens = options["batch_size"] * options["context"]
        return {"seconds": [tokens / speeds[root.name]], "losses": losses[root.name]}

    return run_worker


@pytest.mark.parametrize(("new", "status", "word"), [(97.5, 0, ""), (96.5, 1, "SLOWER"), (120.0, 0, "")])
def test_slower_is_said_and_is_the_status(tmp_path, capsys, monkeypatch, new, status, word):
    folders = {side: tmp_path / side for side in compare.SIDES}
    monkeypatch.setattr(compare, "checkout", lambda name: (folders[name], name))
    monkeypatch.setattr(compare, "check_own", lambda folder: None)
    monkeypatch.setattr(
        measure, "run_worker", _run({"old": 100.0, "new": new}, {"old": [2.0, 1.0], "new": [2.0, 1.25]})
    )
    arguments = ["old", "new", "--cases", "train bfloat16", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert compare.main(arguments) == status
    out = capsys.readouterr().out
    assert f"{new / 100:.3f}" in out
    assert "losses differ by up to 0.25" in out
    assert ("SLOWER" in out) == bool(word)


def test_a_side_that_fails_is_named_and_not_run_again(tmp_path, capsys, monkeypatch):
    tried = []

    def run_worker(module, options, timeout, env=None, launched=(), root=ROOT):
        tried.append(root.name)
        if root.name == "old":
            raise measure.ProgramFailed("status 2: unknown dtype")
        return {"seconds": [1.0], "losses": [1.0]}

    monkeypatch.setattr(compare, "checkout", lambda name: (tmp_path / name, name))
    monkeypatch.setattr(compare, "check_own", lambda folder: None)
    monkeypatch.setattr(measure, "run_worker", run_worker)
    arguments = ["old", "new", "--cases", "train float32", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert compare.main(arguments) == 1
    out = capsys.readouterr().out
    assert "failed: train float32: old: status 2: unknown dtype" in out
    assert "nothing was measured" in out
    assert tried == ["old", "new"]


def test_a_side_is_its_own_package_or_refused(tmp_path):
    """Without a package of its own, the installed one would answer for the folder."""
    with pytest.raises(SystemExit, match=f"gpt2_fast in {tmp_path} is not what Python imports there: "):
        compare.check_own(tmp_path)
    for part in ("", "kernels"):
        (tmp_path / "gpt2_fast" / part).mkdir()
        (tmp_path / "gpt2_fast" / part / "__init__.py").touch()
    compare.check_own(tmp_path)


def test_tokens_are_compared_row_by_row():
    old = {"1": [[5, 6, 7]], "prefill": [[9]]}
    assert compare.outcome(old, {"1": [[5, 6, 7]], "prefill": [[9]]}) == "same"
    assert (
        compare.outcome(old, {"1": [[5, 6, 8]], "prefill": [[9]]}) == "1 rows of tokens differ, the first from token 2"
    )
    assert compare.outcome(old, {"1": [[5, 6]], "prefill": [[1]]}) == "2 rows of tokens differ, the first from token 0"


def test_a_commit_is_unpacked_and_built_once(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    git("init", "-q")
    (tmp_path / "file.txt").write_text("old")
    git("add", ".")
    git("commit", "-qm", "first")
    (tmp_path / "file.txt").write_text("new")
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "BUILDS", tmp_path / "builds")
    built = []
    for _ in range(2):
        folder, name = compare.checkout("HEAD", built.append)
        assert (folder / "file.txt").read_text() == "old"
        assert git("rev-parse", "HEAD").startswith(name)
    assert built == [folder]
    folder.joinpath("built").unlink()  # as a build that was stopped leaves it
    compare.checkout("HEAD", built.append)
    assert built == [folder, folder]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-commit"], "no-such-commit is neither a folder nor a commit"),
        (["EMPTY"], "has no built extension"),
        ([".", "--cases", "train int3"], "--cases has 'train int3'"),
        ([".", "--rounds", "0"], "--rounds and --steps must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        compare.main([str(tmp_path) if word == "EMPTY" else word for word in arguments])
    assert message in f"{raised.value} {capsys.readouterr().err}"
