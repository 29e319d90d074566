"""Memory predicted before it is touched, held to what a process takes; and `gpt2-fast train --dry-run`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt2_fast.cli import main
from gpt2_fast.config import GPT2Config
from gpt2_fast.ops.runtime import cpu_policy
from gpt2_fast.report.available import available_bytes
from gpt2_fast.train import dry_run, memory
from gpt2_fast.train.config import TrainConfig

CPU = torch.device("cpu")

PEAK = """
import json, sys
import gpt2_fast.train.loop, torch._dynamo  # which recomputing imports, 0.1 GB that no step takes
from gpt2_fast.train import dry_run
from gpt2_fast.train.config import TrainConfig
import torch
# Not ru_maxrss, which begins with the peak of the process that forked this one.
def peak():
    with open("/proc/self/status") as lines:
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
dry_run.MEASURED = 2
dry_run.measure(TrainConfig(**json.loads(sys.argv[1])), torch.device("cpu"))
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and malloc are Linux's")
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "recompute": True}, {"dtype": "float16"}], ids=str)
def test_what_a_process_takes(options):
    options = {"model": "nano", "batch_size": 16, "context": 128, "device": "cpu", **options}
    done = subprocess.run([sys.executable, "-c", PEAK, json.dumps(options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted = memory.predict_run(TrainConfig(**options), GPT2Config.from_preset("nano"), "cpu").step
    taken = int(done.stdout.split()[-1])  # which threads' timing moves by a few percent
    # Too low a prediction ends in a process that is killed; too high a one in a smaller micro-batch.
    assert 0.9 * taken < predicted < 1.2 * taken


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layers_activations_are_what_autograd_keeps(dtype):
    """tests/test_model.py::test_what_a_layer_keeps_for_backward counts them."""
    config = GPT2Config(n_layer=3, n_head=2, n_embd=64, vocab_size=64, n_positions=16)
    found = memory.predict(config, batch_size=3, context=16, dtype=dtype).activations
    assert found == 3 * 3 * 16 * (11 * 64 * memory.ITEMSIZE[dtype] + 4 * (2 + 2 + 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_gpu_keeps_besides_is_the_mlps(dtype):
    """By Triton's interpreter: GELU's output and the normalised rows, of more than 64 tokens."""
    pytest.importorskip("triton")
    from gpt2_fast.ops.mlp import mlp

    config, tokens, kept = GPT2Config(n_layer=1, n_head=2, n_embd=24, vocab_size=64, n_positions=16), 70, {}
    shapes = [(tokens, 24), (tokens, 24), (24,), (24,), (24, 96), (96,), (96, 24), (24,)]
    for impl in ("cpp", "triton"):
        inputs = [torch.randn(shape).to(getattr(torch, dtype)).requires_grad_() for shape in shapes]
        parameters, saved = {t.data_ptr() for t in inputs[2:]}, {}
        pack = lambda t, saved=saved: saved.__setitem__(t.data_ptr(), t.nbytes) or t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            mlp(*inputs, impl=impl)
        kept[impl] = sum(nbytes for at, nbytes in saved.items() if at not in parameters)
    on = {device: memory.layer_bytes(config, memory.ITEMSIZE[dtype], device) for device in ("cpu", "cuda")}
    assert kept["triton"] - kept["cpp"] == tokens * (on["cuda"] - on["cpu"]) > 0


def refusal(free, **options):
    config = TrainConfig(device="cpu", **options)
    with pytest.raises(ValueError, match="takes") as caught:
        memory.check_fits(config, GPT2Config.from_preset(config.model), CPU, free=free)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_gpt2_xl_on_16_gb_is_one_line():
    text = refusal(16 * 10**9, model="gpt2-xl")
    assert text.startswith("training gpt2-xl in float32 with --batch-size 8 and --context 1024 takes ")
    assert "this machine has 16.0 GB free; no option brings it below" in text
    assert text.endswith("use --model gpt2-medium, or more memory")


@pytest.mark.parametrize(
    ("free", "options", "offered"),
    [
        (10**10, {"model": "gpt2", "batch_size": 16, "context": 1024}, ["batch_size", "recompute"]),
        (24 * 10**9, {"model": "gpt2-large"}, ["batch_size", "recompute", "dtype"]),
        (4 * 10**9, {"model": "gpt2", "batch_size": 512, "recompute": True, "dtype": "bfloat16"}, ["batch_size"]),
        (2_700 * 10**6, {"model": "gpt2", "batch_size": 1}, ["context"]),
    ],
    ids=lambda value: value["model"] if isinstance(value, dict) else None,
)
def test_what_is_offered_fits_and_the_next_larger_does_not(free, options, offered, monkeypatch):
    """Each alternative of the advice is parsed as the command line does; of a CPU that multiplies bfloat16 as it is."""
    native = replace(cpu_policy.cpu_policy(), native_bfloat16=True)
    monkeypatch.setattr(cpu_policy, "cpu_policy", lambda: native)
    from gpt2_fast.cli import parser
    from gpt2_fast.cli.train import given_options

    text = refusal(free, **options)
    model_config, found = GPT2Config.from_preset(options["model"]), set()
    for flags in text.rpartition("; use ")[2].split(" or "):
        changes = given_options(parser().parse_args(["train", *flags.split()]))
        found |= changes.keys()
        memory.check_fits(TrainConfig(device="cpu", **{**options, **changes}), model_config, CPU, free=free)
        for name in {"batch_size", "context"} & changes.keys():
            larger = {**changes, name: changes[name] + 1}
            refusal(free, **{**options, **larger})
    assert set(offered) <= found


def test_a_captured_graph_is_not_offered_recompute():
    assert "--recompute" not in refusal(10**10, model="gpt2", batch_size=64, compile_graph=True)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_control_groups_limit_counts(tmp_path):
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_bytes(tmp_path) == 8000 << 10
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path / "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/a/memory.max", "1000000\n")
    write(tmp_path / "sys/fs/cgroup/a/memory.current", "700000\n")
    write(tmp_path / "sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 200000\n")
    assert available_bytes(tmp_path) == 500000
    write(tmp_path / "proc/self/cgroup", "4:cpu:/c\n3:memory:/c\n")
    write(tmp_path / "sys/fs/cgroup/memory/c/memory.limit_in_bytes", "300000\n")
    write(tmp_path / "sys/fs/cgroup/memory/c/memory.usage_in_bytes", "100000\n")
    assert available_bytes(tmp_path) == 200000


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT2_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dry_run, "MEASURED", 1)
    (tmp_path / "data").mkdir()
    np.arange(99, dtype="<u2").tofile(tmp_path / "data" / "a.bin")
    options = ["--device", "cpu", "--batch-size", "2", "--context", "16", "--steps", "10", "--grad-accum", "3"]
    assert main(["train", "--dry-run", *options, "--data", "data/*.bin"]) == 0
    printed = capsys.readouterr().out
    for words in ("nano: 7,259,008 parameters", "96 tokens a step", "960 in 10 steps", "AdamW averages", "58 MB",
                  "seconds a step", "tokens a second", "hours a run", "Nothing was written"):  # fmt: skip
        assert words in printed
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "runs/x"], "--dry-run and --resume exclude each other"),
        (["--data", "/nowhere.txt"], "/nowhere.txt does not exist"),
        (["--data", "/nowhere/*.bin"], "/nowhere/*.bin does not exist"),
        (["--seed", str(2**64)], "--seed is 18446744073709551616; it must be from -2^63 to 2^64 - 1"),
        (["--batch-size", "100000000"], "--batch-size 100000000 and --context 256 takes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_dry_run_refuses_in_one_line_before_it_builds(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "build_model", lambda *_: pytest.fail("the model was built"))
    assert main(["train", "--dry-run", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
