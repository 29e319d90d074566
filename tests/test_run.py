"""What a run keeps, and when: checkpoints, the log, the lock, options on resume, and steps that are computed twice."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from test_train import TEXT, corpus, metrics, options  # noqa: F401 - corpus is a fixture

from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.checkpoint import capture_rng
from gpt2_fast.checkpoint.run_folder import checkpoints, load_checkpoint
from gpt2_fast.cli import main
from gpt2_fast.train import resume_run, start_run
from gpt2_fast.train.ahead import Ahead
from gpt2_fast.train.log import MetricsLog
from gpt2_fast.train.readout import Readout
from gpt2_fast.train.saving import Saver, host_copy
from gpt2_fast.train.verify import FaultyMachine, bits, digest

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A checkpoint that a step takes no time with."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def tiny_options(tiny, corpus, out, **more):  # noqa: F811
    return options(corpus, out, **{"init_from": tiny, "dropout": 0.0, **more})


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def weights(folder: Path) -> dict:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    return {name: t.clone() for name, t in model.state_dict().items()}  # not the file's own bytes


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoints_are_kept_by_number_and_the_best_apart(corpus, tmp_path, tiny):  # noqa: F811
    out = tmp_path / "run"
    run = start_run(tiny_options(tiny, corpus, out, steps=10, save_every=2, keep=2, eval_every=3, lr=1e-3))
    losses = iter([9.0, 8.0, 7.0, 7.5, 7.9])  # before, of steps 3, 6, 9 and 10
    run.validate = lambda: next(losses)
    run.train()
    assert names(out) == ["checkpoint-000006", "checkpoint-000008", "checkpoint-000010"]
    assert os.readlink(out / "checkpoint") == "checkpoint-000010"
    assert os.readlink(out / "checkpoint-best") == "checkpoint-000006"
    assert transformers.AutoTokenizer.from_pretrained(out / "checkpoint-000006").vocab_size == 50257
    umask = os.umask(0o022)
    os.umask(umask)
    for file in (out / "checkpoint").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file


def test_time_saves(corpus, tmp_path, monkeypatch, tiny):  # noqa: F811
    out = tmp_path / "run"
    run = start_run(tiny_options(tiny, corpus, out, steps=6, save_every=0, save_minutes=10, keep=9))
    clock = iter(range(0, 10**6, 250))  # more than four minutes between two looks
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    run.checkpoints.saver.last = 0.0
    run._loop()
    run.checkpoints.saver.wait()
    run.home.lock.release()
    assert 1 <= len(names(out)) <= 3


def test_a_step_waits_for_the_copy_alone(tmp_path):
    """While the writer is at work the state changes, and what is written is the state of the call."""
    written, release = [], threading.Event()

    def write(**state):
        release.wait(30)
        written.append({name: t.clone() for name, t in state["model_state"].items()})

    saver, t = Saver(write), torch.zeros(1000)
    saver.save({"model_state": {"t": t, "again": t}}, beside=True)
    t += 1
    assert saver._thread.is_alive()
    assert not written
    release.set()
    saver.save({"model_state": {"t": t}}, beside=True)  # waits for the one before
    saver.wait()
    assert [w["t"].sum().item() for w in written] == [0.0, 1000.0]
    assert written[0]["again"].sum() == 0
    copied = host_copy({"a": t, "b": [t, (t,)]})
    assert copied["a"] is copied["b"][0] is copied["b"][1][0]
    assert copied["a"].data_ptr() != t.data_ptr()


def test_a_full_disk_is_one_line_and_training_goes_on(corpus, tmp_path, monkeypatch, capsys, tiny):  # noqa: F811
    from gpt2_fast.train import checkpoints as room

    out, save, calls = tmp_path / "run", room.save_checkpoint, []

    def full_once(*arguments, **more):
        calls.append(more["step"])
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / "checkpoint-000004"))
        return save(*arguments, **more)

    monkeypatch.setattr(room, "save_checkpoint", full_once)
    start_run(tiny_options(tiny, corpus, out, steps=8, save_every=2, keep=9)).train()
    assert names(out) == ["checkpoint-000002", "checkpoint-000006", "checkpoint-000008"]
    printed = capsys.readouterr()
    assert "No space left on device" in printed.out + printed.err
    assert "Traceback" not in printed.out + printed.err


def losses_of(monkeypatch, by_step: dict) -> None:
    """Validation losses by step; 7.5 where none is given."""
    from gpt2_fast.train import loop, validation

    steps = []
    validate = loop.Run.validate
    monkeypatch.setattr(loop.Run, "validate", lambda run: (steps.append(run.step), validate(run))[1])
    monkeypatch.setattr(validation, "dataset_loss", lambda *a, **o: {"loss": by_step.get(steps[-1], 7.5)})


def best_of(out: Path) -> tuple:
    """What a finished run has as its best, and the validation losses in its log."""
    extra = load_checkpoint(out)[0].extra
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    return os.readlink(out / "checkpoint-best"), extra["best"], extra["best_step"], logged


@pytest.mark.parametrize("best", [3, 6])
def test_a_resumed_run_has_the_best_of_the_undisturbed(corpus, tmp_path, monkeypatch, tiny, best):  # noqa: F811
    """Step 4 has no validation of its own: one that saved nothing hid the best of those after it."""
    losses_of(monkeypatch, {0: 9.0, 3: 8.0, 4: 5.0, 6: 8.5, best: 7.0})
    whole, out = tmp_path / "whole", tmp_path / "run"
    more = {"steps": 10, "save_every": 4, "keep": 9, "eval_every": 3}
    start_run(tiny_options(tiny, corpus, whole, **more)).train()
    start_run(tiny_options(tiny, corpus, out, **more)).train()
    run = resume_run(str(out / "checkpoint-000004"), {})
    assert os.readlink(out / "checkpoint-best") == "checkpoint-000003"  # of the two so far
    run.train()
    assert best_of(out) == best_of(whole)
    assert best_of(out)[:3] == (f"checkpoint-{best:06d}", 7.0, best)


def test_a_signal_before_a_validation_costs_no_best(corpus, tmp_path, monkeypatch, tiny):  # noqa: F811
    losses_of(monkeypatch, {0: 9.0, 2: 7.0, 4: 8.0})
    out = tmp_path / "run"
    run = start_run(tiny_options(tiny, corpus, out, steps=6, save_every=0, eval_every=2))
    run.step = 2
    run.save()  # as Stopped leaves it in the middle of a validation
    run._leave()
    resume_run(str(out), {}).train()
    target, value, step, logged = best_of(out)
    assert (target, value, step) == ("checkpoint-000002-2", 7.0, 2)
    assert logged == [(2, 7.0), (4, 8.0), (6, 7.5)]


def test_a_best_that_the_disk_refused_is_none(corpus, tmp_path, monkeypatch, tiny):  # noqa: F811
    from gpt2_fast.train import checkpoints as room

    out, save = tmp_path / "run", room.save_checkpoint

    def full(*arguments, **more):
        if more["step"] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / "checkpoint-000003"))
        return save(*arguments, **more)

    monkeypatch.setattr(room, "save_checkpoint", full)
    losses_of(monkeypatch, {0: 9.0, 3: 6.0, 6: 8.0, 9: 8.5, 10: 8.5})
    start_run(tiny_options(tiny, corpus, out, steps=10, save_every=4, keep=1, eval_every=3)).train()
    assert best_of(out)[:3] == ("checkpoint-000006", 8.0, 6)


def test_killed_before_the_first_checkpoint(corpus, tmp_path, capsys, tiny):  # noqa: F811
    """One command, which the refusal names, starts it again with its options."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    start_run(tiny_options(tiny, corpus, whole, steps=3)).train()
    run = start_run(tiny_options(tiny, corpus, out, steps=3))
    run.home.log.write(step=1, loss=1.0)
    run.home.lock.release()
    assert main(["train", "--data", str(corpus), "--out", str(out)]) == 2
    assert f"continue it with --resume {out}" in capsys.readouterr().err
    assert main(["train", "--resume", str(out)]) == 0
    assert metrics(out, "loss") == metrics(whole, "loss")
    assert same(weights(out / "checkpoint"), weights(whole / "checkpoint"))


def test_stopped_before_the_first_step(tiny, corpus, tmp_path):  # noqa: F811
    whole, out = tmp_path / "whole", tmp_path / "run"
    start_run(tiny_options(tiny, corpus, whole, steps=3)).train()
    run = start_run(tiny_options(tiny, corpus, out, steps=3))
    run.ending.stop.asked = "SIGTERM"
    run.train()
    assert names(out) == ["checkpoint-000000"]
    assert main(["train", "--resume", str(out)]) == 0
    assert metrics(out, "loss") == metrics(whole, "loss")
    assert metrics(out, "val_loss") == metrics(whole, "val_loss")


def test_what_a_killed_writer_left_is_mended(tiny, corpus, tmp_path):  # noqa: F811
    """Its temporary files, a link to the checkpoint before, and a link to one that is no longer there."""
    out = tmp_path / "run"
    start_run(tiny_options(tiny, corpus, out, steps=4, save_every=2, lr=1e-3)).train()
    (out / ".checkpoint-000004.0123abcd.tmp").mkdir()
    (out / ".loss.png.0123abcd.tmp").write_bytes(b"half")
    (out / ".mine.tmp").write_bytes(b"a user's")
    for link, target in (("checkpoint", "checkpoint-000002"), ("checkpoint-best", "checkpoint-000099")):
        (out / link).unlink(missing_ok=True)
        (out / link).symlink_to(target)
    assert main(["train", "--resume", str(out)]) == 0
    assert os.readlink(out / "checkpoint") == "checkpoint-000004"
    assert os.readlink(out / "checkpoint-best") == "checkpoint-000004"
    assert sorted(path.name for path in out.glob(".*tmp")) == [".mine.tmp"]


def test_resume_auto(corpus, tmp_path, monkeypatch, tiny):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--resume", "auto", "--data", str(corpus), "--context", "16", "--batch-size", "2",
                 "--eval-batches", "1", "--eval-every", "0", "--init-from", tiny]  # fmt: skip
    assert main([*arguments, "--steps", "2"]) == 0
    (out,) = Path("runs").iterdir()
    assert main([*arguments, "--steps", "3"]) == 0
    assert [path.name for path in Path("runs").iterdir()] == [out.name]
    assert len(metrics(out, "loss")) == 3
    named = [*arguments, "--out", "named"]
    assert main([*named, "--steps", "1"]) == 0
    assert main([*named, "--steps", "2"]) == 0
    assert len(metrics(Path("named"), "loss")) == 2


def test_a_second_run_in_one_folder_is_refused(corpus, tmp_path, capsys, tiny, forks):  # noqa: F811
    out = tmp_path / "run"
    run = start_run(tiny_options(tiny, corpus, out, steps=2))
    other = forks(0, "training_ranks", "train", "--resume", out, cwd=tmp_path)
    assert other["codes"] == [2]
    assert other["stderr"][0].strip().splitlines()[-1] == (
        f"gpt2-fast: --out {out} is in use by another run; wait for it, or choose another --out"
    )
    run.train()
    assert main(["train", "--resume", str(out), "--steps", "3"]) == 0


def test_damage_names_the_file_and_the_checkpoint_before(corpus, tmp_path, capsys, tiny):  # noqa: F811
    out = tmp_path / "run"
    start_run(tiny_options(tiny, corpus, out, steps=4, save_every=2)).train()
    whole = weights(out / "checkpoint")
    path = out / "checkpoint-000004" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert main(["train", "--resume", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{path} is damaged" in error
    before = f"--resume {out / 'checkpoint-000002'}"
    assert before in error
    assert main(["train", *before.split()]) == 0
    assert names(out) == ["checkpoint-000002", "checkpoint-000004"]
    assert (out / "replaced-checkpoint-000004").is_dir()
    assert same(weights(out / "checkpoint"), whole)
    assert metrics(out, "step") == sorted(metrics(out, "step"))


def test_other_data_under_the_same_name_is_refused(corpus, tmp_path, capsys, tiny):  # noqa: F811
    out = tmp_path / "run"
    start_run(tiny_options(tiny, corpus, out, steps=2)).train()
    corpus.write_text(TEXT + "x = 1\n" * 1000)
    assert main(["train", "--resume", str(out), "--steps", "3"]) == 2
    assert f"--data {corpus} holds other tokens" in capsys.readouterr().err
    other = corpus.with_name("other.txt")
    other.write_text(TEXT + "x = 1\n" * 1000)
    assert main(["train", "--resume", str(out), "--steps", "3", "--data", str(other)]) == 0
    assert "other data" in capsys.readouterr().out


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_another_dtype_goes_on_from_the_float32_weights(corpus, tmp_path, capsys, before, after, tiny):  # noqa: F811
    out = tmp_path / "run"
    run = start_run(tiny_options(tiny, corpus, out, steps=3, dtype=before))
    run.train()
    wide = {name: run.optimizer.state[p].get("master", p).detach().clone() for name, p in run.model.named_parameters()}
    averages = {name: run.optimizer.state[p]["exp_avg"].clone() for name, p in run.model.named_parameters()}
    run = resume_run(str(out), {"dtype": after, "steps": 4})
    assert f"goes on in {after} ({before} before), from its float32 weights" in capsys.readouterr().out
    for name, p in run.model.named_parameters():
        state = run.optimizer.state[p]
        assert torch.equal(state["exp_avg"], averages[name])
        assert ("master" in state) == (after == "bfloat16")
        assert torch.equal(state.get("master", p), wide[name])
        assert torch.equal(p, wide[name].to(p.dtype))
    run.train()


@pytest.mark.parametrize("after", ["bfloat16", "float32"])
def test_a_weight_that_was_written_before_it_was_saved_is_gone_on_from(corpus, tmp_path, after, tiny):  # noqa: F811
    """The others from their float32 masters."""
    out = tmp_path / "run"
    run = start_run(tiny_options(tiny, corpus, out, steps=2, dtype="bfloat16"))
    run.train()
    bias = run.model.transformer.ln_f.bias
    expected = run.optimizer.state[bias]["master"].clone()
    bias.data[3] = expected[3] = 0.5
    run.save()
    run = resume_run(str(out), {"dtype": after, "steps": 3})
    bias = run.model.transformer.ln_f.bias
    assert torch.equal(run.optimizer.state[bias].get("master", bias), expected)
    assert torch.equal(bias, expected.to(bias.dtype))


def test_what_is_given_on_resume_takes_effect(corpus, tmp_path, capsys, tiny):  # noqa: F811
    out = tmp_path / "run"
    start_run(tiny_options(tiny, corpus, out, steps=2)).train()
    given = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "grad_clip": 0.5, "seed": 7, "steps": 4}
    run = resume_run(str(out), given)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in run.optimizer.param_groups} == {(0.8, 0.9)}
    assert run.optimizer.clip_grad_norm == 0.5
    assert run.config.seed == 7
    assert yaml.safe_load((out / "config.yaml").read_text())["beta1"] == 0.8
    run.home.lock.release()
    for flag, value in [("--model", "gpt2"), ("--dropout", "0.5"), ("--init-from", "gpt2"), ("--out", "elsewhere")]:
        assert main(["train", "--resume", str(out), flag, value]) == 2
        assert f"{flag} cannot change when a run is resumed" in capsys.readouterr().err


def test_another_instruction_set_is_said(corpus, tmp_path, capsys, monkeypatch, tiny):  # noqa: F811
    from gpt2_fast.train import setting

    out = tmp_path / "run"
    start_run(tiny_options(tiny, corpus, out, steps=1)).train()
    here = setting.environment(torch.device("cpu"))
    monkeypatch.setattr(setting, "environment", lambda device: here | {"instruction set": "other"})
    resume_run(str(out), {"steps": 2}).home.lock.release()
    said = f"another instruction set ({here['instruction set']} before, other now): other bits from here"
    assert said in capsys.readouterr().out


def test_another_number_of_threads_is_said_where_it_counts(corpus, tmp_path, capsys, monkeypatch, tiny):  # noqa: F811
    """A vendor's library adds in an order that depends on them; this package's own products do not."""
    from gpt2_fast.report import machine

    threads, out = torch.get_num_threads(), tmp_path / "run"
    own = machine.cpu_policy()
    monkeypatch.setattr(machine, "cpu_policy", lambda: dataclasses.replace(own, own=False))
    start_run(tiny_options(tiny, corpus, out, steps=1)).train()
    try:
        torch.set_num_threads(threads + 1)
        resume_run(str(out), {"steps": 2}).home.lock.release()
        said = f"another number of threads ({threads} before, {threads + 1} now): other bits from here"
        assert said in capsys.readouterr().out
        monkeypatch.setattr(machine, "cpu_policy", lambda: dataclasses.replace(own, own=True))
        assert "number of threads" not in machine.environment(torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)


def test_a_run_of_an_earlier_version_goes_on(corpus, tmp_path, tiny):  # noqa: F811
    """training.pt and an ordinary folder `checkpoint`, as versions before this one left them."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    start_run(tiny_options(tiny, corpus, whole, steps=4)).train()
    run = start_run(tiny_options(tiny, corpus, out, steps=2))
    run.train()
    state, path = load_checkpoint(out)
    earlier = {"format": "gpt2_fast training state 1", "step": 2, "config": state.config.to_dict(),
               "model": state.model, "optimizer": state.optimizer, "rng": state.rng,
               "extra": {"train_config": {k: v for k, v in state.extra["train_config"].items()
                                          if k not in ("keep", "save_minutes", "verify_every")}}}  # fmt: skip
    (out / "checkpoint").unlink()
    (out / "checkpoint-best").unlink(missing_ok=True)
    path.rename(out / "checkpoint")
    (out / "checkpoint" / "training.safetensors").unlink()
    (out / "config.yaml").unlink()
    torch.save(earlier, out / "training.pt")
    assert main(["train", "--resume", str(out), "--steps", "4"]) == 0
    assert same(weights(out / "checkpoint"), weights(whole / "checkpoint"))
    assert not (out / "training.pt").exists()
    assert os.readlink(out / "checkpoint") == "checkpoint-000004"


def test_an_earlier_state_that_does_not_fit_is_one_line(tiny, corpus, tmp_path, capsys):  # noqa: F811
    """training.pt has no digest: what is in it is held to the model that its own config describes."""
    out = tmp_path / "run"
    start_run(tiny_options(tiny, corpus, out, steps=1)).train()
    state, _ = load_checkpoint(out)
    parts = {"step": 1, "config": state.config.to_dict(), "model": state.model, "optimizer": state.optimizer,
             "rng": state.rng, "extra": {"train_config": state.extra["train_config"]}}  # fmt: skip
    name, path = "transformer.h.0.ln_1.weight", tmp_path / "earlier" / "training.pt"
    averages = {**state.optimizer, "state": {**state.optimizer["state"], 0: {
        **state.optimizer["state"][0], "exp_avg": torch.zeros(3)}}}  # fmt: skip
    path.parent.mkdir()
    options_of = state.extra["train_config"]
    for changed, message in [
        ({"model": {**state.model, name: torch.zeros(5)}}, f"its {name} is \\(5,\\); that of its config is \\(32,\\)"),
        ({"model": {k: v for k, v in state.model.items() if k != name}}, f"its {name} is missing"),
        ({"optimizer": averages}, r"exp_avg of parameter 0 is \(3,\)"),
        ({"rng": {"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": []}}, "RNG state"),
        ({"extra": {}}, "has no options of a run"),
        ({"extra": {"train_config": {**options_of, "colour": 1}}}, "'colour', an option that this version"),
    ]:
        torch.save({"format": "gpt2_fast training state 1", **parts, **changed}, path)
        assert main(["train", "--resume", str(path.parent)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(message, error), error
        assert str(path.parent) in error


def test_the_log_has_each_line_once(tmp_path, capsys, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 5):
        log.write(step=step, loss=float(step))
    log.write(step=2, val_loss=0.5)
    log.write(step=2, val_loss=0.5)
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # a crash in the middle of a line
    assert [r["step"] for r in log.up_to(3)] == [1, 2, 3, 2]
    log.keep(log.up_to(3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 2]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=f"{path} is damaged at line 2"):
        log.read()


def test_a_full_disk_tears_no_line_of_the_log(tmp_path, capsys, monkeypatch):
    log, write = MetricsLog(tmp_path / "metrics.jsonl"), os.write
    log.write(step=1, loss=1.0)
    room = [10]

    def short(file, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count, room[0] = write(file, data[: room[0]]), 0
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        log.write(step=2, loss=2.0)
        log.write(step=3, loss=3.0)
        assert [r["step"] for r in log.read()] == [1]
    assert capsys.readouterr().err.count("its lines wait in memory") == 1
    log.write(step=4, loss=4.0)
    assert [r["step"] for r in log.read()] == [1, 2, 3, 4]


class Recorder:
    """A device's stream on paper: what was queued, and what the host waited for."""

    def __init__(self):
        self.calls: list[str] = []

    def event(self):
        recorder = self

        class Event:
            def record(self):
                recorder.calls.append("record")

            def synchronize(self):
                recorder.calls.append("wait")

        return Event()


def test_a_step_is_queued_before_the_last_ones_loss_is_read(corpus, tmp_path, monkeypatch, tiny):  # noqa: F811
    """The order of calls that a GPU would see: step n + 1, then the wait for the event behind step n."""
    recorder = Recorder()
    run = start_run(tiny_options(tiny, corpus, tmp_path / "run", steps=4))
    run.readout._events = [recorder.event() for _ in range(Readout.PLACES)]
    take = run.run_step
    run.run_step = lambda *arguments: (recorder.calls.append("step"), take(*arguments))[1]
    run._loop()
    run.home.lock.release()
    assert recorder.calls == ["step", "record", *["step", "wait", "record"] * 3, "wait"]


def test_what_is_read_is_of_its_own_step():
    """A captured step writes its loss and norm to the same place each time."""
    readout, loss, norm = Readout(torch.device("cpu")), torch.zeros(()), torch.zeros(())
    places = []
    for step in range(5):
        loss.fill_(step)
        norm.fill_(10 + step)
        places.append(readout.queue(loss, norm))
        if step:
            assert readout.read(places[-2]) == (step - 1, 9 + step, None, False)
    assert readout.read(readout.queue(loss, None)) == (4, None, None, False)
    assert readout.read(readout.queue(loss, None, torch.tensor(8.0), torch.tensor(1.0))) == (4, None, 8.0, True)


def test_batches_come_in_order_and_errors_where_they_belong():
    made = []

    def make(i):
        made.append(i)
        if i == 7:
            raise ValueError("batch 7")
        return i * i

    ahead = Ahead(make, 3, 9)
    assert [next(ahead) for _ in range(4)] == [9, 16, 25, 36]
    with pytest.raises(ValueError, match="batch 7"):
        next(ahead)
    ahead.close()
    assert made == [3, 4, 5, 6, 7]
    ahead = Ahead(make, 0, 1000)
    assert next(ahead) == 0
    ahead.close()  # does not wait for the rest
    assert len(made) < 15
    assert list(Ahead(make, 0, 3)) == [0, 1, 4]


@pytest.mark.parametrize("more", [{}, {"dtype": "bfloat16", "dropout": 0.1, "grad_accum": 2}], ids=str)
def test_verified_steps_change_no_bit(corpus, tmp_path, more, tiny):  # noqa: F811
    plain, twice = tmp_path / "plain", tmp_path / "twice"
    start_run(tiny_options(tiny, corpus, plain, steps=5, **more)).train()
    start_run(tiny_options(tiny, corpus, twice, steps=5, verify_every=1, **more)).train()
    assert metrics(plain, "loss") == metrics(twice, "loss")
    assert metrics(plain, "grad_norm") == metrics(twice, "grad_norm")
    a, b = (load_checkpoint(folder)[0] for folder in (plain, twice))
    assert same(a.model, b.model)
    for i, state in a.optimizer["state"].items():
        assert same(state, b.optimizer["state"][i])


TRIALS = int(os.environ.get("GPT2_FAST_TEST_FLIPS", "6"))
WHERE = ["weights", "averages", "gradients", "outputs"]  # a flip is; its place is a seed, the same in every process


def flip(t: torch.Tensor, generator: torch.Generator, lowest: int) -> None:
    """One bit, of those from `lowest` on, of one element that is not so small that an update rounds it away."""
    raw = bits(t)
    width = t.element_size() * 8
    large = (t.detach().abs() >= t.detach().abs().median()).flatten().nonzero().flatten()
    element = int(large[torch.randint(len(large), (1,), generator=generator)])
    bit = int(torch.randint(lowest, width, (1,), generator=generator))
    raw[element * t.element_size() + bit // 8] ^= 1 << (bit % 8) if bit % 8 < 7 else 128


@pytest.mark.parametrize("where", WHERE)
def test_a_flipped_bit_is_found(corpus, tmp_path, where, tiny):  # noqa: F811
    """In the first or in the second computation; and what is kept is the checkpoint before it."""
    out = tmp_path / "run"
    run = start_run(tiny_options(tiny, corpus, out, steps=50, verify_every=1, save_every=1))
    generator = torch.Generator().manual_seed(WHERE.index(where))
    parameters = [p for name, p in run.model.named_parameters() if p.ndim > 1 and "wpe" not in name]
    compute, calls = run.run_step._compute, [0]
    pick = lambda: parameters[int(torch.randint(len(parameters), (1,), generator=generator))]

    def broken():
        calls[0] += 1
        hit = calls[0] == broken.at
        handles = []
        if hit and where == "gradients":
            handles = [pick().register_hook(lambda g: (flip(g := g.clone(), generator, 8), g)[1])]
        if hit and where == "outputs":
            block = run.model.transformer.h[0].mlp.c_fc.weight

            def change(p):
                flip(p.grad, generator, 8)

            handles = [block.register_post_accumulate_grad_hook(change)]
        if hit and where == "weights":
            flip(pick().data, generator, 8)
        compute()
        if hit and where == "averages":
            flip(run.optimizer.state[pick()]["exp_avg"], generator, 8)
        for handle in handles:
            handle.remove()

    run.run_step._compute = broken
    batch = run._batches(0)
    for trial in range(TRIALS):
        calls[0], broken.at = 0, 1 + trial % 2
        before = {name: t.clone() for name, t in run.run_step.tensors().items()}
        with pytest.raises(FaultyMachine, match=f"step 1 is not repeatable: .*go on with --resume {out}"):
            run._take(batch)
        assert calls[0] >= broken.at  # the flip was made
        with torch.no_grad():
            for name, t in run.run_step.tensors().items():
                t.copy_(before[name]) if name in before else t.zero_()
    run.home.lock.release()


def test_weights_that_change_between_steps_are_found(corpus, tmp_path, tiny):  # noqa: F811
    run = start_run(tiny_options(tiny, corpus, tmp_path / "run", steps=4, verify_every=2))
    run._take(run._batches(0))
    run.step = 1
    with torch.no_grad():
        flip(run.model.transformer.h[1].attn.c_attn.weight.data, torch.Generator().manual_seed(1), 0)
    with pytest.raises(FaultyMachine, match=r"h\.1\.attn\.c_attn\.weight changed in memory between two steps"):
        run._take(run._batches(1))
    run.home.lock.release()


def test_a_digest_changes_with_every_bit():
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.randn(3, 13).to(dtype)
        before = digest({"t": t})
        for bit in range(t.numel() * t.element_size() * 8):
            raw = bits(t)
            raw[bit // 8] ^= 1 << (bit % 8)
            assert digest({"t": t}) != before, bit
            raw[bit // 8] ^= 1 << (bit % 8)
    assert digest({"t": torch.tensor([1.0, 2.0, 3.0, 4.0])}) != digest({"t": torch.tensor([3.0, 4.0, 1.0, 2.0])})


def test_a_second_signal_leaves_at_once(corpus, tmp_path, tiny):  # noqa: F811
    code = (
        "import sys, time; from gpt2_fast.train import start_run\n"
        f"run = start_run({tiny_options(tiny, corpus, tmp_path / 'run', steps=50)!r})\n"
        "take = run.run_step\n"
        "def step(*a):\n"
        "    print('step', flush=True); time.sleep(60); return take(*a)\n"
        "run.run_step = step\n"
        "run.train()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with contextlib.closing(process.stdout) as lines:
        while b"step" not in lines.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM


def test_random_states_survive(corpus, tmp_path, tiny):  # noqa: F811
    out = tmp_path / "run"
    start_run(tiny_options(tiny, corpus, out, steps=2, dropout=0.1)).train()
    state, _ = load_checkpoint(out)
    run = resume_run(str(out), {"steps": 3})
    assert torch.equal(capture_rng()["cpu"], state.rng["cpu"])
    run.home.lock.release()
