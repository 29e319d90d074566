"""`gpt2-fast train` as people use it: it learns, resumes to the bit, stops cleanly and explains what is wrong."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers

from gpt2_fast.checkpoint.run_folder import checkpoints
from gpt2_fast.cli import main
from gpt2_fast.train import Run, start_run
from gpt2_fast.train.config import TrainConfig

TEXT = "".join(f"def f{i}(x):\n    return x + {i % 7}\n\n" for i in range(3000))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


def options(corpus, out, **more):
    small = {"model": "nano", "data": str(corpus), "context": 16, "batch_size": 2, "steps": 6, "warmup": 2}
    return {**small, "eval_every": 0, "eval_batches": 2, "out": str(out), **more}


def metrics(folder, key):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in records if key in r]


def test_learns_and_leaves_what_transformers_loads(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    start_run(options(corpus, out, steps=12, lr=3e-3, eval_every=5, sample_every=6)).train()
    losses, val = metrics(out, "loss"), metrics(out, "val_loss")
    assert len(losses) == 12
    assert len(val) == 4
    assert losses[0] > 10
    assert losses[-1] < losses[0] - 1.5
    assert val[-1] < val[0] - 1.5
    printed = capsys.readouterr().out
    assert "validation loss before: 10." in printed
    assert "sample:" in printed
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    model = transformers.GPT2LMHeadModel.from_pretrained(out / "checkpoint")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "checkpoint")
    ids = tokenizer("def f1(x):", return_tensors="pt").input_ids
    assert model(ids, labels=ids).loss.item() < 10


def test_a_bfloat16_run_keeps_the_float32_weights(corpus, tmp_path):
    """Those that the float32 run of the same seed begins with."""
    wide = Run(TrainConfig(**options(corpus, tmp_path / "wide")))
    run = Run(TrainConfig(**options(corpus, tmp_path / "run", dtype="bfloat16")))
    for p, q in zip(run.model.parameters(), wide.model.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert torch.equal(run.optimizer.state[p]["master"], q.detach())
        assert torch.equal(p.detach(), q.detach().bfloat16())


@pytest.mark.usefixtures("blank_pictures", "small_nano")
@pytest.mark.parametrize("more", [{}, {"dtype": "bfloat16", "dropout": 0.1, "grad_accum": 2}], ids=str)
def test_resume_repeats_to_the_bit(corpus, tmp_path, more):
    whole, half = tmp_path / "whole", tmp_path / "half"
    start_run(options(corpus, whole, **more)).train()
    stopped = Run(TrainConfig(**options(corpus, half, save_every=3, **more)))
    original = stopped.checkpoints.save

    def save_then_die(*arguments, **options):
        original(*arguments, **options)
        raise KeyboardInterrupt

    stopped.checkpoints.save = save_then_die  # as if the machine went down right after the checkpoint of step 3
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert [path.name for path in checkpoints(half)] == ["checkpoint-000003"]
    assert main(["train", "--resume", str(half)]) == 0
    assert metrics(half, "loss") == metrics(whole, "loss")
    a, b = (
        transformers.GPT2LMHeadModel.from_pretrained(folder / "checkpoint").state_dict() for folder in (whole, half)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def heard(name):
    """Not ignored, as nohup and a shell's background ignore signals: a run leaves those to them."""
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)
    yield
    signal.signal(getattr(signal, name), before)


@pytest.mark.usefixtures("blank_pictures", "small_nano")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_says_how_to_resume(corpus, tmp_path, capsys, heard, name):
    out = tmp_path / "run"
    run = start_run(options(corpus, out, steps=100_000))
    take = run.run_step

    def step(*arguments):
        if run.step == 3:
            os.kill(os.getpid(), getattr(signal, name))
        return take(*arguments)

    run.run_step = step
    before = signal.getsignal(getattr(signal, name))
    run.train()
    assert signal.getsignal(getattr(signal, name)) == before
    assert run.interrupted
    assert run.step == 4
    printed = capsys.readouterr().out
    assert f"{name}: stopped at step 4 of 100000; continue with: gpt2-fast train --resume {out}" in printed
    assert main(["train", "--resume", str(out), "--steps", "6"]) == 0
    assert len(metrics(out, "loss")) == 6


def test_gradient_accumulation_is_one_large_batch(corpus, tmp_path):
    """The first step's loss and gradients over two micro-batches are those of the same four sequences at once."""
    split = start_run(options(corpus, tmp_path / "a", batch_size=2, grad_accum=2, grad_clip=0.0))
    whole = start_run(options(corpus, tmp_path / "b", batch_size=4, grad_clip=0.0))
    inputs, targets = split._batches(0)
    flat = [t.reshape(1, 4, 16) for t in (inputs, targets)]
    losses = [split.run_step(inputs, targets, 1e-3), whole.run_step(*flat, 1e-3)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    # The average that holds the gradients as they are: Adam's first step would hide their scale and enlarge the
    # rounding of the smallest.
    for a, b in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        a, b = split.optimizer.state[a]["exp_avg"], whole.optimizer.state[b]["exp_avg"]
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_fine_tuning_starts_from_a_checkpoint(corpus, tmp_path):
    """From a transformers folder: its loss at the start, its dropout kept, its format at the end; and it resumes."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=32))
    theirs.save_pretrained(tmp_path / "theirs")
    out = tmp_path / "run"
    run = start_run(options(corpus, out, init_from=str(tmp_path / "theirs"), steps=2))
    assert run.model.config.attn_pdrop == 0.1
    inputs, targets = next(run.val_data.windows(batch_size=2))
    ours = run.model.eval()(inputs.to(run.device), targets=targets.to(run.device)).loss.cpu()
    logits = theirs.eval()(inputs).logits
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    run.model.train()
    run.train()
    saved = transformers.GPT2LMHeadModel.from_pretrained(out / "checkpoint").state_dict()
    assert not torch.equal(saved["transformer.wte.weight"], theirs.state_dict()["transformer.wte.weight"])
    (tmp_path / "theirs").rename(tmp_path / "gone")
    assert main(["train", "--resume", str(out), "--steps", "3"]) == 0
    assert len(metrics(out, "loss")) == 3


def test_weight_decay_reaches_matrices_only(corpus, tmp_path):
    run = start_run(options(corpus, tmp_path / "run"))
    decayed = {id(p) for group in run.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, p in run.model.named_parameters():
        assert (id(p) in decayed) == (p.ndim == 2), name


@pytest.mark.parametrize("impl", ["auto", "reference", "cpp"])
def test_the_named_implementation_updates_too(corpus, tmp_path, impl):
    run = Run(TrainConfig(**options(corpus, tmp_path / "run", impl=impl, device="cpu")))
    assert run.optimizer.impl == impl


def test_learning_rate_schedule():
    config = TrainConfig(lr=1.0, min_lr=0.1, warmup=10, steps=110)
    assert config.learning_rate(0) == pytest.approx(0.1)
    assert config.learning_rate(9) == pytest.approx(1.0)
    assert config.learning_rate(60) == pytest.approx(0.55)
    assert config.learning_rate(110) == pytest.approx(0.1)


@pytest.mark.parametrize("lr", [1e-3, 3e-5, 1e-7, 0.0])
def test_learning_rate_never_rises_after_warmup(lr):
    """The end of the cosine follows --lr, also where it is low, as in fine-tuning."""
    config = TrainConfig(lr=lr, warmup=10, steps=110)
    rates = [config.learning_rate(step) for step in range(9, 111)]
    assert all(later <= rate * (1 + 1e-12) for rate, later in itertools.pairwise(rates))
    assert rates[0] == pytest.approx(lr)
    assert rates[-1] == pytest.approx(lr / 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt3"], "unknown model 'gpt3'"),
        (["--device", "cuda"], "torch finds no CUDA device"),
        (["--device", "tpu0"], "choose auto, cpu, cuda"),
        (["--context", "5000"], "nano has 256 positions; lower --context"),
        (["--context", "0"], "--context is 0; it must be at least 1"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--lr", "3e-5", "--min-lr", "1e-4"], "--min-lr is 0.0001 and --lr 3e-05, so the rate would rise; give a"),
        (["--lr", "nan"], "--lr is nan; it must be a number of at least 0"),
        (["--dropout", "1"], "--dropout is 1.0; it must be at least 0 and below 1"),
        (["--model", "gpt2-xl", "--init-from", "somewhere"], "--model and --init-from exclude each other"),
        (["--dtype", "float8"], "choose float32, bfloat16, float16"),
        (["--impl", "magic"], "impl is 'magic'"),
        (["--data", "/nowhere.txt"], "/nowhere.txt does not exist"),
        (["--out", "/proc/run"], "choose another --out"),
        (["--resume", "/nowhere"], "no run to resume"),
        (["--compile-graph"], "--compile-graph needs a CUDA device"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(corpus, tmp_path, capsys, monkeypatch, arguments, message):
    if "CUDA" in message:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *arguments]
    assert main(given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("gpt2-fast: ")
    assert message in error


def test_refuses_to_write_over_a_run(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    start_run(options(corpus, out, steps=1)).train()
    before = (out / "metrics.jsonl").read_bytes()
    assert main(["train", "--data", str(corpus), "--out", str(out)]) == 2
    assert f"continue it with --resume {out}" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


def test_data_too_short_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GPT2_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "short.txt"
    path.write_text("too short")
    assert main(["train", "--data", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "shorter context" in capsys.readouterr().err


def test_help_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from gpt2_fast.cli import main\ntry: main(['train', '--help'])\n"
         "finally: assert 'torch' not in sys.modules"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--grad-accum" in done.stdout
