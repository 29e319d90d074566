"""What somebody meets in the first hour: help, mistyped options, files of options, progress, pipes, no network."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from test_train import corpus, metrics  # noqa: F401 - corpus is a fixture

from gpt2_fast import GPT2Config, GPT2LMHeadModel, __version__
from gpt2_fast.checkpoint import load_pretrained
from gpt2_fast.cli import main
from gpt2_fast.cli.command import parse
from gpt2_fast.cli.shared import as_text
from gpt2_fast.cli.train import given_options
from gpt2_fast.generate import completions, tokenizer_of
from gpt2_fast.train import sample as room
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.options import merged, read_options, write_options
from gpt2_fast.train.progress import Progress

SIZES = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32"]


@pytest.fixture
def train(corpus, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Runs `gpt2-fast train` on a small model and its data; (status, stdout, stderr). No plots, no samples."""
    monkeypatch.setattr("gpt2_fast.report.figures.save_loss_plot", lambda metrics, path: path.write_bytes(b""))
    monkeypatch.setattr(room, "sample_text", lambda *_: "a sample")

    def run(*arguments, data=str(corpus), small=True):
        given = ["--data", data, *SIZES, "--context", "16", "--batch-size", "2", "--warmup", "2"] if small else []
        given += ["--eval-batches", "1", "--eval-every", "0"] if small else []
        capsys.readouterr()
        try:
            status = main(["train", *given, *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, n_positions=48)).save_pretrained(path)
    return str(path)


def told(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    return end.value.code, *capsys.readouterr()


def test_no_command_shows_help_and_version_names_what_runs(capsys):
    status, out, err = told(capsys)
    assert (status, err) == (0, "")
    for command in ("train", "generate", "eval", "inspect", "doctor", "convert"):
        assert f"\n    {command} " in out
    status, out, err = told(capsys, "--version")
    assert (status, err) == (0, "")
    assert out.startswith(f"gpt2-fast {__version__} (torch {torch.__version__.split('+')[0]}")


def test_a_wrong_option_is_answered_by_its_own_command(capsys):
    for command, wrong, right in (
        ("train", "--batchsize", "--batch-size"),
        ("generate", "--max-token=3", "--max-new-tokens"),
        ("convert", "--dtpye", "--dtype"),
        ("train", "--block-size", "--context"),  # nanoGPT's name
        ("train", "--learning_rate=3e-4", "--lr"),
        ("generate", "--prompt=Hello", "--prompt-file"),  # no abbreviation of it
    ):
        status, out, err = told(capsys, command, *(["a", "b"] if command == "convert" else []), wrong)
        assert (status, out) == (2, "")
        assert err.startswith(f"usage: gpt2-fast {command} ")
        assert err.splitlines()[-1].endswith(f"unrecognized arguments: {wrong} (did you mean {right}?)")


def test_whole_numbers_may_be_written_as_floats(capsys):
    options = given_options(parse(["train", "--max-tokens", "1e6", "--batch-size", "8", "--seed", "1_000"]))
    assert options == {"max_tokens": 1_000_000, "batch_size": 8, "seed": 1000}
    for wrong in ("1.5", "1e400", "nan", "many"):
        status, _, err = told(capsys, "train", "--steps", wrong)
        assert (status, err.splitlines()[-1]) == (
            2, f"gpt2-fast train: error: argument --steps: invalid whole number value: '{wrong}'"
        )  # fmt: skip


def test_usage_shows_what_can_be_chosen(capsys):
    for command, words in (
        (
            "train",
            ["--dtype {float32,bfloat16", "--order {random,epoch}", "{nano,distilgpt2,gpt2,", "{jsonl,tensorboard"],
        ),
        ("generate", ["--weights {float32,bfloat16,int8,int4}", "--impl {auto,reference,cpp,triton}"]),
        ("eval", ["--dtype {float32,bfloat16,float16}", "--impl {auto,reference,cpp,triton}"]),
    ):
        out = " ".join(told(capsys, command, "--help")[1].split())
        for text in words:
            assert text in out


def test_the_preset_takes_other_sizes(train, tmp_path, folder):
    assert train("--out", tmp_path / "run", "--steps", 1)[0] == 0
    config, _ = load_pretrained(tmp_path / "run" / "checkpoint")
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (1, 2, 32, 256)
    for arguments, message in (
        (["--n-embd", "33"], "n_embd is 33, which n_head = 2 does not divide"),
        (["--n-embd", "512"], "n_head is 2, which makes heads of n_embd / n_head = 256"),
        (["--n-layer", "0"], "n_layer is 0"),
        (["--init-from", folder], "--n-layer and --init-from exclude each other"),
    ):
        status, _, err = train("--out", tmp_path / "other", *arguments)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
    status, _, err = train("--resume", tmp_path / "run", "--n-layer", 2, small=False)
    assert (status, "--n-layer cannot change when a run is resumed" in err) == (2, True)


def test_max_tokens_are_steps_and_the_schedule_ends_there(train, tmp_path):
    out = tmp_path / "run"
    assert train("--out", out, "--max-tokens", 16 * 2 * 2 * 3 - 1, "--grad-accum", 2)[0] == 0
    assert len(metrics(out, "loss")) == 3  # the last one whole
    used = read_options(out / "config.yaml")
    assert used["steps"] == 3
    assert "max_tokens" not in used
    config = TrainConfig(**used)
    assert metrics(out, "lr") == [config.learning_rate(step) for step in range(3)]
    status, _, err = train("--max-tokens", 9, "--steps", 9)
    assert status == 2
    assert "not allowed with argument" in err.splitlines()[-1]
    assert "--max-tokens is 0; it must be at least 1" in train("--max-tokens", 0)[2]


def test_a_runs_config_starts_it_again(train, tmp_path):
    """Every option that is not the default comes back; the command line wins over the file."""
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    more = ["--steps", "4", "--lr", "3e-3", "--beta1", "0.8", "--dropout", "0.1", "--recompute", "--dtype", "bfloat16"]
    assert train("--out", first, *more, "--grad-accum", 2)[0] == 0
    assert not (first / "run.json").exists()
    assert train("--config", first / "config.yaml", "--out", again, small=False)[0] == 0
    for key in ("loss", "lr", "grad_norm", "val_loss"):
        assert metrics(first, key) == metrics(again, key)
    a, b = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, again))
    assert a | {"out": None} == b | {"out": None}
    assert set(a) == set(TrainConfig.__dataclass_fields__)
    assert (
        train("--config", first / "config.yaml", "--out", other, "--max-tokens", 1, "--no-recompute", small=False)[0]
        == 0
    )
    c = yaml.safe_load((other / "config.yaml").read_text())
    assert (c["steps"], c["recompute"], c["beta1"]) == (1, False, 0.8)


def test_an_earlier_runs_options_are_read(train, tmp_path):
    """run.json is what config.yaml was: a run that was killed before its first checkpoint goes on from it."""
    out = tmp_path / "run"
    assert train("--out", out, "--steps", 1)[0] == 0
    options = yaml.safe_load((out / "config.yaml").read_text())
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "run.json").write_text(json.dumps({**options, "out": str(killed)}))
    assert train("--resume", killed, small=False)[0] == 0
    assert metrics(killed, "loss") == metrics(out, "loss")
    assert [(killed / name).exists() for name in ("config.yaml", "run.json")] == [True, False]


def test_values_have_their_fields_types(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("lr: 3e-4\nsteps: 1e3\nbeta2: 1\nlog: [jsonl, wandb]\nrecompute: on\ndropout: null\nout: '2026'\n")
    options = read_options(path)
    assert options == {
        "lr": 3e-4, "steps": 1000, "beta2": 1.0, "log": "jsonl,wandb", "recompute": True, "out": "2026",
    }  # fmt: skip
    assert [type(options[name]) for name in ("lr", "steps", "beta2")] == [float, int, float]
    config = TrainConfig(**options, model="gpt2", data="a: #b", seed=2**63, min_lr=1e-300)
    write_options(path, config)
    assert TrainConfig(**read_options(path)) == config
    assert merged({"steps": 3, "lr": 1.0}, {"max_tokens": 9}) == {"lr": 1.0, "max_tokens": 9}
    assert merged({"max_tokens": 3}, {"steps": 9}) == {"steps": 9}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch-size: 4", "'batch-size' is no option of train; did you mean batch_size?"),
        ("learning_rate: 1e-4", "'learning_rate' is no option of train; did you mean lr?"),
        ("learning: 1", "'learning' is no option of train"),
        ("steps: many", "steps is 'many'; it must be a whole number"),
        ("steps: 1.5", "steps is 1.5; it must be a whole number"),
        ("steps: yes", "steps is True; it must be a whole number"),
        ("recompute: 1", "recompute is 1; it must be true or false"),
        ("out: 123", "out is 123; it must be text; put it in quotes"),
        ("lr: [1]", "lr is a list; it must be a number"),
        ("steps: null", "steps is None; it must be a whole number"),
        ("steps: 1\nlr: 1\nsteps: 2", "has steps twice; remove one"),
        ("steps: 1\nmax_tokens: 2", "has steps and max_tokens, which exclude each other"),
        ("steps: [1", "line 1 is not YAML"),
        ("- steps", "holds no options; write lines such as: steps: 300"),
        ("", "holds nothing"),
        ("out: !!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
    ],
)
def test_a_bad_file_of_options_is_one_line(train, tmp_path, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    status, _, err = train("--config", path)
    assert status == 2
    assert words in err
    assert str(path) in err
    assert err.count("\n") == 1


def test_off_a_terminal_a_line_every_few_steps(train, tmp_path):
    status, out, err = train("--out", tmp_path / "run", "--steps", 5, "--log-every", 2)
    assert status == 0
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 1/5", "step 2/5", "step 4/5", "step 5/5"]
    losses = metrics(tmp_path / "run", "loss")
    assert [line.split(", ")[1] for line in lines] == [f"loss {losses[i]:.4f}" for i in (0, 1, 3, 4)]
    assert "\r" not in err
    assert "validation loss before" in out


def test_quiet_prints_errors_and_paths_alone(train, tmp_path):
    run = tmp_path / "run"
    paths = "".join(f"{run / name}\n" for name in ("metrics.jsonl", "loss.png", "checkpoint"))
    assert train("--out", run, "--steps", 2, "--sample-every", 1, "--quiet") == (0, paths, "")
    assert "--steps is 0" in train("--steps", 0, "--quiet")[2]
    status, out, _ = train("--resume", run, "--no-quiet", small=False)
    assert (status, out.count("nothing is left to do")) == (0, 1)


def test_on_a_terminal_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(3, 1, every=1) as progress:
        progress.advance()
        progress.report(2, 1.25, 1e-3, 1234.0)
    shown = sys.stderr.getvalue()
    assert "2/3" in shown
    assert "loss 1.250, lr 1.0e-03, 1,234 tok/s" in shown
    assert "step 2/3" not in shown


def test_a_finished_run_says_that_nothing_is_left(train, tmp_path):
    run = tmp_path / "run"
    assert train("--out", run, "--steps", 2)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoint").iterdir()}
    log = (run / "metrics.jsonl").read_text()
    status, out, err = train("--resume", run, small=False)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == (
        f"{run} is finished: 2 of 2 steps are done and nothing is left to do; a larger --steps goes on"
    )
    assert (run / "metrics.jsonl").read_text() == log
    assert before == {path: path.stat().st_mtime_ns for path in (run / "checkpoint").iterdir()}
    out = train("--resume", run, "--steps", 1, small=False)[1]
    assert out.splitlines()[0] == f"{run} is finished: it is at step 2, past --steps 1; a larger --steps goes on"
    assert train("--resume", run, "--steps", 3, small=False)[0] == 0
    assert len(metrics(run, "loss")) == 3


def test_eval_only_is_the_runs_own_validation(train, tmp_path, corpus, monkeypatch):  # noqa: F811
    run = tmp_path / "run"
    assert train("--out", run, "--steps", 2, "--dtype", "bfloat16")[0] == 0
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    last = metrics(run, "val_loss")[-1]
    given = ["--data", corpus, "--context", 16, "--batch-size", 2, "--eval-batches", 1, "--dtype", "bfloat16"]
    for arguments in (["--resume", run], ["--resume", run / "checkpoint"], ["--init-from", run / "checkpoint", *given]):
        status, out, _ = train("--eval-only", *arguments, small=False)
        assert status == 0
        assert out.startswith(f"validation loss: {last:.4f} (perplexity {math.exp(last):.2f}, 32 tokens of {corpus}")
    assert sorted(tmp_path.rglob("*")) == before
    assert "--eval-only needs weights: give --init-from or --resume" in train("--eval-only")[2]


STAND_IN = """
calls = []
class Settings:
    def __init__(self, **options): self.options = options
class Run:
    def __init__(self, id): self.id = id
    def define_metric(self, *a, **k): calls.append(("metric", a, k))
    def log(self, record): calls.append(("log", record))
    def finish(self): calls.append(("finish",))
def init(**options):
    calls.append(("init", options))
    return Run(options["id"] or "made-1")
"""


@pytest.fixture
def trackers(tmp_path, monkeypatch):
    """Modules of the names and the calls of tensorboard and wandb, which record them."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "wandb.py").write_text(STAND_IN)
    (modules / "tensorboard.py").write_text("")
    monkeypatch.syspath_prepend(modules)
    for name in ("wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / "events.1").write_text("")
            calls.append(("open", purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        flush = lambda self: calls.append(("flush",))
        close = lambda self: calls.append(("close",))

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    yield lambda: (sys.modules["wandb"].calls, calls)
    sys.modules.pop("wandb", None)
    sys.modules.pop("tensorboard", None)


def test_trackers_have_the_numbers_of_the_log(train, tmp_path, trackers):
    """A run that goes on continues its curves; one that had no tracker gives it what stands in metrics.jsonl."""
    out = tmp_path / "run"
    assert train("--out", out, "--steps", 2)[0] == 0
    assert train("--resume", out, "--steps", 3, "--log", "tensorboard", "--log", "wandb", small=False)[0] == 0
    assert train("--resume", out, "--steps", 4, small=False)[0] == 0  # with the trackers it had
    wandb, board = trackers()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [call[1] for call in wandb if call[0] == "log"] == records
    expected = [(name, value, r["step"]) for r in records for name, value in r.items() if name != "step"]
    assert [call for call in board if len(call) == 3] == expected
    assert [call for call in board if call[0] == "open"] == [("open", None), ("open", 4)]
    inits = [call[1] for call in wandb if call[0] == "init"]
    assert [(options["id"], options["resume"]) for options in inits] == [(None, "allow"), ("made-1", "allow")]
    assert inits[0]["config"]["steps"] == 3
    assert [call for call in wandb if call[0] == "finish"] == [("finish",)] * 2
    assert ("flush",) in board
    assert board[-1] == ("close",)


def test_a_tracker_that_fails_does_not_end_a_run(train, tmp_path, trackers, monkeypatch):
    import torch.utils.tensorboard as board

    def full(*_):
        raise OSError("No space left")

    monkeypatch.setattr(board.SummaryWriter, "add_scalar", full)
    status, _, err = train("--out", tmp_path / "run", "--steps", 2, "--log", "tensorboard")
    assert status == 0
    assert err.count("--log tensorboard failed (No space left); training goes on without it") == 1
    assert len(metrics(tmp_path / "run", "loss")) == 2


def test_a_tracker_that_is_not_installed_is_one_line(train, tmp_path, monkeypatch):
    from gpt2_fast.train import trackers as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    status, _, err = train("--out", tmp_path / "run", "--log", "jsonl,wandb")
    assert status == 2
    assert err == "gpt2-fast: --log wandb needs the package wandb; run: pip install wandb\n"
    assert not (tmp_path / "run").exists()
    assert "--log is 'csv'; choose among jsonl, tensorboard, wandb" in train("--log", "csv")[2]


class Piped(io.TextIOWrapper):
    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))


def test_a_prompt_comes_from_a_pipe_or_a_file(folder, capsys, tmp_path, monkeypatch):
    greedy = ["--model", folder, "--max-new-tokens", "4", "--temperature", "0", "--device", "cpu"]
    text = "two lines,\nünd more"
    assert main(["generate", text, *greedy]) == 0
    expected = capsys.readouterr().out
    file = tmp_path / "prompt.txt"
    file.write_bytes(text.encode() + b"\n")
    for arguments in ([], ["-"], ["--prompt-file", "-"], ["--prompt-file", str(file)]):
        monkeypatch.setattr(sys, "stdin", Piped(file.read_bytes()))
        assert main(["generate", *arguments, *greedy]) == 0
        assert capsys.readouterr().out == expected
    file.write_text(text, encoding="utf-8-sig")
    assert main(["generate", "--prompt-file", str(file), *greedy]) == 0
    assert capsys.readouterr().out == expected
    for arguments, message in (
        (["a", "--prompt-file", str(file)], "PROMPT and --prompt-file exclude each other"),
        (["-", "--prompt-file", str(file)], "PROMPT and --prompt-file exclude each other"),
        (["--prompt-file", "no.txt"], "cannot read no.txt (No such file"),
        ([], "what is piped in is not UTF-8 text (byte 3)"),
    ):
        monkeypatch.setattr(sys, "stdin", Piped(b"caf\xe9"))
        assert main(["generate", *arguments, *greedy]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_text_on_the_command_line_is_utf_8(folder, capsys, monkeypatch):
    """Whatever the locale made of its bytes; and a stdout that cannot show a text is named."""
    greedy = ["--model", folder, "--max-new-tokens", "2", "--temperature", "0", "--seed", "1", "--device", "cpu"]
    assert main(["generate", "naïve", "--json", *greedy]) == 0
    expected = capsys.readouterr().out
    bytes_of = lambda text: text.encode().decode(
        "ascii", "surrogateescape"
    )  # as Python reads arguments in the C locale
    assert main(["generate", bytes_of("naïve"), "--json", *greedy]) == 0
    assert capsys.readouterr().out == expected
    latin = "na\udcefve"
    for arguments, name in ((["generate", latin], "PROMPT"), (["generate", "a", "--stop", latin], "--stop"),
                            (["inspect", folder, "--attention", latin], "--attention")):  # fmt: skip
        assert main([*arguments, *(greedy if "generate" in arguments else [])]) == 2
        assert capsys.readouterr().err == f"gpt2-fast: {name} is not UTF-8 text (byte 2)\n"
    with monkeypatch.context() as of_a_caller_in_python:
        of_a_caller_in_python.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
        assert as_text("日", "PROMPT") == "日"
        with pytest.raises(ValueError, match="^PROMPT has '.ud800', which is no character"):
            as_text("\ud800", "PROMPT")
    for encoding in ("ascii", "latin-1", "cp1252"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert main(["generate", "日", *greedy]) == 2
        error = f"gpt2-fast: stdout is {encoding}, which has no '\\u65e5'; set PYTHONIOENCODING=utf-8\n"
        assert capsys.readouterr().err == error


def test_json_is_an_object_a_sample_and_can_be_had_again(folder, capsys):
    command = ["generate", "A", "--model", folder, "--max-new-tokens", "6", "--json", "--device", "cpu"]
    assert main([*command, "--num-samples", "2"]) == 0
    first = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    seed = first[0]["seed"]
    model = GPT2LMHeadModel.from_pretrained(folder)
    expected = completions(model, tokenizer_of(50257), "A", 6, num_samples=2, seed=seed, top_k=50)
    assert [(one["text"], one["tokens"]) for one in first] == [(one.text, one.tokens) for one in expected]
    assert {(one["prompt"], one["model"], one["seed"], one["finish_reason"]) for one in first} == {
        ("A", folder, seed, "length")
    }
    assert [one["sample"] for one in first] == [1, 2]
    stop = tokenizer_of(50257).decode(first[0]["tokens"][3:4])
    assert main([*command, "--seed", str(seed), "--stop", stop]) == 0
    (one,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert one["finish_reason"] == "stop_sequence"
    assert first[0]["text"].startswith(one["text"])
    assert stop not in one["text"]


def test_end_of_text_is_a_reason(folder):
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder), tokenizer_of(50257)
    (free,) = completions(model, tokenizer, "A", 6, temperature=0)
    model.config = GPT2Config(**{**vars(model.config), "eos_token_id": free.tokens[3]})
    (ended,) = completions(model, tokenizer, "A", 6, temperature=0)
    assert ended.finish_reason == "eos_token"
    assert ended.tokens == free.tokens[: free.tokens.index(free.tokens[3])]


def test_eval_prints_json_alone(folder, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("She sells sea shells by the sea shore. " * 4)
    (tmp_path / "l.jsonl").write_text('{"text": "She sells sea shells"}\n')
    command = ["eval", folder, "--text", str(tmp_path / "a.txt"), "--lambada", str(tmp_path / "l.jsonl")]
    assert main([*command, "--json", str(tmp_path / "out.json"), "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert main([*command, "--json", "-", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == json.loads((tmp_path / "out.json").read_text())
    measures = json.loads(out)["results"][0]["measures"]
    assert f"{measures['loss']:.4f}" in table
    assert list(measures) == ["loss", "perplexity", "tokens"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "--init-from", "gpt2"], "--model gpt2 trains that size from fresh weights"),
        (["generate", "a"], "gpt2-fast train --model nano makes one"),
        (["eval", "gpt2", "--text", __file__], "gpt2-fast train --model nano makes one"),
        (["inspect", "gpt2", "--positions"], "gpt2-fast inspect gpt2 prints the tables of a preset without weights"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_no_network_names_what_works_without(command, words, capsys, tmp_path, monkeypatch):
    """The hub's name has no address: it is said at once, and nothing tries again for minutes."""
    import huggingface_hub

    from gpt2_fast import hub_client

    def no_address(*_):
        raise OSError("Name or service not known")

    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(hub_client.socket, "getaddrinfo", no_address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "neither a folder here nor in the Hugging Face cache" in err
    assert words in err
    assert err.count("\n") == 1


def test_a_model_that_is_not_here_is_one_line_in_a_new_process(tmp_path):
    """Where nothing else has imported what the hub's client brings."""
    command = [sys.executable, "-m", "gpt2_fast", "generate", "--model", "no/such", "a"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpt2-fast: 'no/such' is neither a folder here nor in the Hugging Face cache")
    assert done.stderr.count("\n") == 1


def test_a_sample_that_cannot_be_shown_ends_no_run(train, tmp_path, monkeypatch):
    """One that cannot be decoded, and one that the terminal's encoding has not: the checkpoint is there after both."""

    def undecodable(*_):
        raise ValueError("token id 9 is no character")

    for name, sample in (("decode", undecodable), ("show", lambda *_: "a \udc80 b")):
        monkeypatch.setattr(room, "sample_text", sample)
        status, out, err = train("--steps", "2", "--sample-every", "1", "--out", tmp_path / name)
        assert status == 0, err
        assert (tmp_path / name / "checkpoint" / "config.json").exists()
        assert ("(no sample: token id 9 is no character)" in out) == (name == "decode")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("steps: 3\nlr: 1e-3\nmin_lr: 5.0e-05\n", {"steps": 3, "lr": 1e-3, "min_lr": 5e-5}),
        ("\ufeffsteps: 3\n", {"steps": 3}),
        ("seed: 9007199254740993\nwarmup: 3.0\n", {"seed": 9007199254740993, "warmup": 3}),
        ("grad_clip: .inf\n", {"grad_clip": math.inf}),
        ("{steps: 3, steps: 4}", "steps twice"),
        ("? steps\n: 3\n? steps\n: 4\n", "steps twice"),
        ("\ufeffsteps: 3\nsteps: 4\n", "steps twice"),
        ("steps: 1:30\n", "steps is '1:30'; it must be a whole number"),
        ("seed: 010\n", "seed is '010'; it must be a whole number"),
        ("lr: '1_0'\n", "lr is '1_0'; it must be a number"),
        ("seed: '9007199254740993'\n", "it must be a whole number"),
    ],
)
def test_numbers_of_a_file_are_those_that_stand_there(text, found, tmp_path):
    """Or it is refused: YAML 1.1 reads 1:30 as 90, 010 as 8, and of a key that is written twice the last counts."""
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    if isinstance(found, dict):
        assert read_options(file) == found
    else:
        with pytest.raises(ValueError, match=re.escape(found)):
            read_options(file)
