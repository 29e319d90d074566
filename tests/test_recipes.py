"""Recipes: what they write, what their data comes by, and the nano recipe beside transformers, shortened."""

from __future__ import annotations

import http.server
import json
import os
import shlex
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks import reproduce
from gpt2_fast import recipes
from gpt2_fast.cli import main
from gpt2_fast.data import hub, read_bin, write_bin
from gpt2_fast.train.config import TrainConfig

CPU = torch.device("cpu")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks of it. files: repository -> name -> content."""

    files: dict[str, dict[str, bytes]] = {}
    asked: list[str] = []

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "datasets"]:
            listing = [
                {"type": "file", "path": name, "oid": "1", "size": 1} for name in self.files["/".join(path[2:4])]
            ]
            content, more = json.dumps(listing).encode(), {"Content-Type": "application/json"}
        else:
            content = self.files.get("/".join(path[1:3]), {}).get("/".join(path[5:]))
            more = {"ETag": f'"{len(content or b"")}"', "X-Repo-Commit": "a" * 40}
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if body:
            self.asked.append(path[-1])
        self.send_response(200)
        for name, value in {**more, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A hub on this machine, and a function that runs `gpt2-fast fetch` with it."""
    source = hub.SHARDS["fineweb10B"]
    shard = tmp_path / "shard.bin"
    write_bin(shard, [np.arange(5000, dtype=np.uint16)])
    whole = shard.read_bytes()
    Hub.files = {
        source.repo: {source.val: whole, source.train.format(1): whole, source.train.format(2): whole[:-400]},
        hub.HELLASWAG: {"README.md": b"", "data/validation-00000-of-00001.parquet": b"[]"},
    }
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)

    def fetch(*arguments, **more):
        command = [sys.executable, "-m", "gpt2_fast", "fetch", *map(str, arguments)]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, timeout=120)

    yield fetch
    server.shutdown()


def test_shards_come_once_and_are_looked_at(served, tmp_path):
    """By the real client: all that is asked for, nothing twice; a file that is not whole is named."""
    folder, (val, first) = tmp_path / "data", ("fineweb_val_000000.bin", "fineweb_train_000001.bin")
    done = served("fineweb10B", folder, "--shards", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{folder / val}: 5,000 tokens (1 of 2)",
        f"{folder / first}: 5,000 tokens (2 of 2)",
    ]
    assert [len(read_bin(folder / name).tokens) for name in (val, first)] == [5000, 5000]
    (folder / first).write_bytes((folder / first).read_bytes()[:-2])
    Hub.asked.clear()
    done = served("fineweb10B", folder, "--shards", 2)
    lines = done.stdout.splitlines()
    assert lines[0] == f"{folder / val}: there already, 5,000 tokens (1 of 3)"
    assert "it is fetched again" in lines[1]
    assert Hub.asked == [first, "fineweb_train_000002.bin"]
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "fineweb_train_000002.bin" in done.stderr
    assert "5,000" in done.stderr


def test_what_is_no_shard_is_not_kept(served, tmp_path):
    """The page of a proxy has an even number of bytes, too, and would be read as nanoGPT's tokens."""
    source = hub.SHARDS["fineweb10B"]
    Hub.files[source.repo][source.val] = b"<html>log in</html>\n"
    done = served("fineweb10B", tmp_path / "data", "--shards", 1)
    assert done.returncode == 2
    assert "has no llm.c header; what was fetched is no token shard" in done.stderr
    assert not (tmp_path / "data" / source.val).exists()


def test_what_cannot_be_fetched_is_one_line(served, tmp_path):
    missing = served("fineweb-edu10B", tmp_path / "edu")
    offline = served("fineweb10B", tmp_path / "off", HF_HUB_OFFLINE="1")
    for done, words in ((missing, "kjj0/finewebedu10B-gpt2"), (offline, "the hub was not reached; check the name")):
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.strip().count("\n") == 0, done.stderr
    for given, words in (("imagenet", "no data set 'imagenet'; choose"), ("hellaswag", "one file; drop --shards")):
        with pytest.raises(ValueError, match=words):
            hub.fetch(given, tmp_path, 3)
    with pytest.raises(ValueError, match="--shards is 104; fineweb10B has 1 to 103"):
        hub.fetch("fineweb10B", tmp_path, 104)


def test_a_connection_that_breaks_is_one_line(served, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "_answer", lambda self, body: self.connection.close())
    modules = _pyarrow(tmp_path)
    # The real client waits 23 seconds between its tries.
    (modules / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    done = served("hellaswag", tmp_path / "data", PYTHONPATH=str(modules))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("gpt2-fast: the data set Rowan/hellaswag")
    assert "Traceback" not in done.stderr


def _pyarrow(folder: Path) -> Path:
    """A folder in which pyarrow stands in for itself: three of its methods, on a file of JSON."""
    package = folder / "modules" / "pyarrow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parquet.py").write_text(
        "import json\nclass read_table:\n    def __init__(self, path): self.path = path\n"
        "    def to_pylist(self): return json.load(open(self.path))\n"
    )
    return package.parent


def test_hellaswag_becomes_what_eval_reads(tmp_path, monkeypatch):
    """Through what stands in for pyarrow."""
    record = {"ind": 1, "activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "ctx": "A man cooks. He",
              "endings": ["eats.", "flies.", "sings.", "sinks."], "label": "0"}  # fmt: skip
    parquet = tmp_path / "questions"
    parquet.write_text(json.dumps([record, record]))
    monkeypatch.syspath_prepend(_pyarrow(tmp_path))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: ["README.md", "data/validation-0.parquet"])
    monkeypatch.setattr(hub, "_download", lambda repo, name, folder: parquet)
    monkeypatch.setattr(hub.hub_client, "reachable", lambda: True)
    lines = []
    (path,) = hub.fetch("hellaswag", tmp_path / "data", say=lines.append)
    assert lines == [f"{path}: 2 questions"]
    from gpt2_fast import GPT2Config, GPT2LMHeadModel
    from gpt2_fast.evaluate import hellaswag

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, n_positions=64)).eval()
    assert hellaswag(model, path)["examples"] == 2


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipes_files_are_the_run(name, tmp_path, capsys):
    """config.yaml is the options, the README's commands are those that are printed, and neither is written over."""
    folder, recipe = tmp_path / "r", recipes.get(name)
    assert main(["recipe", name, "--out", str(folder), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    config = TrainConfig(**yaml.safe_load((folder / "config.yaml").read_text()))
    assert config.batch_size * config.grad_accum == recipe.sequences
    assert config == recipes.config_of(recipe, folder, config.batch_size)
    readme = (folder / "README.md").read_text()
    commands = [command for _, command in recipes.commands(recipe, folder)]
    assert all(command in readme and command in printed for command in commands)
    assert main(["recipe", name, "--out", str(folder), "--device", "cpu"]) == 0
    smaller = str(config.batch_size // 2)
    assert main(["recipe", name, "--out", str(folder), "--device", "cpu", "--batch-size", smaller]) == 2
    assert "config.yaml is there and says something else" in capsys.readouterr().err


def test_out_may_be_in_the_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["recipe", "nano", "--out", "~/runs", "--device", "cpu"]) == 0
    assert (tmp_path / "runs" / "config.yaml").exists()
    assert "~" not in capsys.readouterr().out


def test_commands_are_what_a_shell_takes(tmp_path):
    folder = tmp_path / "my runs"
    for name in recipes.RECIPES:
        plain, quoted = (
            [shlex.split(command) for _, command in recipes.commands(recipes.get(name), path)]
            for path in (tmp_path / "runs", folder)
        )
        assert quoted == [[word.replace(str(tmp_path / "runs"), str(folder)) for word in words] for words in plain]
        assert all(str(folder) in " ".join(words) for words in quoted)


def test_gpt2_124m_is_ten_billion_tokens():
    """Half a million a step, as llm.c's run has it: 19,073 steps are the 10 billion that its 3.28 is after."""
    recipe = recipes.get("gpt2-124m")
    assert recipe.tokens == 2**19
    assert 0 <= 10e9 - recipe.tokens * recipe.options["steps"] < recipe.tokens
    config = recipes.config_of(recipe, Path("x"), 16)
    assert config.learning_rate(699) == pytest.approx(6e-4)
    assert config.learning_rate(19_073) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt3"], "no recipe 'gpt3'; choose gpt2-124m, nano"),
        (["nano", "--batch-size", "3"], "--batch-size is 3; it must divide the 16 sequences of a step"),
        (["nano", "--batch-size", "0"], "--batch-size is 0; it must divide the 16 sequences of a step"),
        (["nano", "--batch-size", "4", "--processes", "3"], "3"),
        (["nano", "--batch-size", "16", "--processes", "8"], "8"),
        (["nano", "--processes", "3"], "--processes is 3; it must be a power of two up to 16"),
        (["nano", "--processes", "32"], "--processes is 32; it must be a power of two up to 16"),
    ],
)
def test_what_no_recipe_has_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", *arguments, "--device", "cpu"]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_micro_batches_fit_memory_and_processes(monkeypatch):
    recipe = recipes.get("gpt2-124m")
    found = []
    for gigabytes in (400, 9):
        monkeypatch.setattr("gpt2_fast.train.memory.free_bytes", lambda device, g=gigabytes: g << 30)
        found.append(recipes.micro_batch(recipe, CPU))
    assert found[0] == 64
    assert found == sorted(set(found), reverse=True)
    monkeypatch.setattr("gpt2_fast.train.memory.free_bytes", lambda device: 400 << 30)
    assert recipes.micro_batch(recipe, CPU, 64) == 8
    monkeypatch.setattr("gpt2_fast.train.memory.free_bytes", lambda device: 1 << 30)
    with pytest.raises(ValueError, match="takes .* and this machine has"):
        recipes.micro_batch(recipe, CPU)


def test_dry_run_says_what_it_takes(capsys, tmp_path, monkeypatch, small_nano):
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", "nano", "--device", "cpu", "--dry-run", "--processes", "2"]) == 0
    out = capsys.readouterr().out
    for words in ("2,048 tokens a step", "1,024,000 in 500 steps", "hours of the run, on one such device",
                  "hours on 2, divided evenly", "Nothing was written"):  # fmt: skip
        assert words in out
    assert list(tmp_path.iterdir()) == []


def test_the_nano_recipe_runs_whole_beside_transformers(tmp_path, monkeypatch, capfd, small_nano):
    """Two steps of it, by its own commands: two programs, one curve, as far as float32 goes."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    commands = []
    # In this process: three of their own would be most of the time.
    here = lambda command, check: commands.append(main([*map(str, command[3:])]))
    monkeypatch.setattr(reproduce, "subprocess", types.SimpleNamespace(run=here))
    folder = tmp_path / "whole"
    arguments = ["--steps", "2", "--folder", str(folder), "--out", str(tmp_path)]
    assert reproduce.main([*arguments, "--double", "1"]) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert commands == [0, 0, 0]
    assert record["tokens"] == 2 * 2048
    assert list(record["curves"]["gpt2_fast"]["val_loss"]) == ["0", "1", "2"]
    assert record["farthest"]["loss"] < 2e-5 * 11
    assert record["farthest"]["val_loss"] < 2e-5 * 11
    first, last = (record["curves"]["gpt2_fast"]["loss"][step] for step in ("1", "2"))
    assert last < first
    assert path.with_suffix(".png").stat().st_size > 10_000
    exact = record["float64"]
    assert list(exact["loss"]) == ["1"]
    assert 0 < exact["farthest"]["gpt2_fast"] < 2e-5
    assert 0 < exact["farthest"]["transformers"] < 2e-5
    # What has ended is not trained again: neither by the recipe's own commands, nor here.
    monkeypatch.setattr(reproduce, "train_transformers", None)
    assert reproduce.main(arguments) == 0
    again = json.loads(path.read_text())
    assert again["curves"] == record["curves"]
    assert again["seconds"] == {"gpt2_fast": None, "transformers": None}
    assert "not timed" in capfd.readouterr().out


@pytest.mark.parametrize("steps", ["-1", "7"])
def test_float64_cannot_be_longer_than_the_run(steps, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--steps", "6", "--double", steps])
    assert f"--double is {steps}; the run has 6 steps" in capsys.readouterr().err
