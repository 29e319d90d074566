"""The benchmarks run, their numbers parse, and a program that computes something else is seen; no speed is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import measure, profile_step, programs, train, train_report
from benchmarks.mfu import conventions
from benchmarks.peers import nanogpt
from benchmarks.programs import PROGRAMS, Setting, batch
from gpt2_fast import GPT2Config
from gpt2_fast.report.machine import card_peak

ROOT = Path(__file__).parent.parent
SMOKE = ("--model", "smoke", "--batch-size", "2", "--context", "16", "--rounds", "1", "--warmup", "1", "--steps", "2")


def test_train_in_a_smoke_size(tmp_path, capsys):
    names = "gpt2_fast,transformers,gpt2_fast-graph"
    options = ("--dtype", "float32", "--programs", names, "--device", "cpu", "--out", str(tmp_path))
    assert train.main([*SMOKE, *options]) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["skipped"] == {"gpt2_fast-graph": "a CUDA graph needs a GPU"}
    ours, base = record["rows"]
    assert (ours["program"], base["program"]) == ("gpt2_fast float32", "transformers float32")
    assert ours["losses"] == pytest.approx(base["losses"], rel=1e-4)
    assert ours["losses"][2] < ours["losses"][1] < ours["losses"][0]  # one batch again and again is learnt
    assert base["ratio"] == 1.0
    assert ours["ratio"] == pytest.approx(base["gpt2_fast_is"])
    assert ours["launches"] < base["launches"]
    for row in record["rows"]:
        rate = row["tokens_per_second"]
        assert 0 < rate["p20"] <= rate["median"] <= rate["p80"]
        peak = record["peaks"]["float32"]["flops_per_second"]
        assert row["mfu"]["llm.c"] == pytest.approx(rate["median"] * record["flops_per_token"]["llm.c"] / peak)
    assert record["machine"]["versions"]["torch"]
    assert record["command"].startswith("python -m benchmarks train --model smoke")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert train.main(["--show", str(path)]) == 0
    assert f"| {ours['tokens_per_second']['median']:,.0f} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--programs", "llama"), "--programs has 'llama'; choose of gpt2_fast, gpt2_fast-graph, reference"),
        (("--context", "256,0"), "--context is '256,0'; give numbers above 0, by comma"),
        (("--context", "2048"), "--context has 2048 and gpt2 has 1024 positions; lower it"),
        (("--dtype", "float64"), "--dtype has 'float64'; choose of float32, bfloat16"),
    ],
)
def test_bad_input_is_one_line(arguments, said):
    with pytest.raises(SystemExit) as refused:
        train.main(["--device", "cpu", *arguments])
    assert str(refused.value).startswith(said)


def _row(name, dtype, rate, losses):
    return {"program": f"{name} {dtype}", "name": name, "dtype": dtype, "losses": losses, "rounds": [rate, 2 * rate],
            "tokens_per_second": {"median": rate, "p20": rate, "p80": rate}, "first_step_seconds": 1.0,
            "peak_bytes": 1, "launches": 1}  # fmt: skip


def test_a_program_that_computes_something_else_gets_no_speed():
    rows = [
        _row("gpt2_fast", "float32", 30.0, [11.0, 10.0]),
        _row("gpt2_fast", "bfloat16", 60.0, [11.001, 10.09]),
        _row("nanogpt", "float32", 90.0, [11.0, 10.02]),
        _row("nanogpt", "bfloat16", 90.0, [11.0, float("nan")]),
        _row("transformers", "float32", 10.0, [11.0, 10.0]),
        _row("transformers", "bfloat16", 50.0, [11.0, 10.2]),
        _row("reference", "bfloat16", 50.0, [11.02, 10.0]),
    ]
    train_report.judge(rows)
    train_report.compare(rows, {"float32": 1e3, "bfloat16": 2e3}, {"llm.c": 5})
    assert [row["losses_agree"] for row in rows] == [True, True, False, False, True, False, False]
    assert [row["ratio"] for row in rows] == [3.0, 6.0, None, None, 1.0, None, None]
    assert rows[1]["mfu"] == {"llm.c": pytest.approx(60 * 5 / 2e3)}
    assert rows[4]["gpt2_fast_is"] == 3.0
    for row in rows[2:4] + rows[5:]:
        shown = train_report.cells(row)
        assert shown[1:10] == ("-",) * 9
        assert shown[-1].endswith("WRONG")


@pytest.mark.parametrize(("last", "agree"), [(0.00781, True), (0.0080, False)])
def test_a_loss_near_0_is_held_to_what_is_noise_at_1(last, agree):
    rows = [_row("reference", "float32", 10.0, [11.0, 0.0078]), _row("gpt2_fast", "float32", 30.0, [11.0, last])]
    train_report.judge(rows)
    assert rows[1]["losses_agree"] is agree


def test_flops_a_token_are_their_authors():
    """llm.c 803.5M, nanoGPT 855.4M, flash-attention 796.7M, at T = 1024 with the vocabulary padded to 50304."""
    padded = GPT2Config(vocab_size=50304)
    assert conventions(padded, 1024) == {
        "llm.c": pytest.approx(803.5e6, rel=1e-4),
        "palm": pytest.approx(855.4e6, rel=1e-4),
        "flash": pytest.approx(796.7e6, rel=1e-4),
    }


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_the_peak_is_the_cards_own(name, peak):
    assert card_peak(name, "bfloat16") == peak


def test_the_nanogpt_peer_is_gpt2():
    """Its loss and gradients are transformers', with torch's own fused loss too; without the mask they are not."""
    import transformers

    from benchmarks.programs import NO_DROPOUT, SIZES

    setting = Setting("smoke", torch.float32, "cpu", 2, 16)
    ids, targets = batch(setting)
    truth = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES["smoke"], **NO_DROPOUT)).double()
    expected = truth(ids, labels=ids, shift_labels=targets).loss
    expected.backward()
    losses = [nanogpt.cross_entropy]
    if nanogpt.torch_linear_cross_entropy_missing("cpu") is None:
        losses.append(nanogpt.torch_linear_cross_entropy())
    for loss in losses:
        model = nanogpt.NanoGPT(**SIZES["smoke"], loss=loss).load_gpt2(truth.float().state_dict())
        truth.double()
        value = model(ids, targets)
        value.backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        for mine, theirs in ((model.wte, truth.transformer.wte), (model.h[0].ln_1, truth.transformer.h[0].ln_1)):
            torch.testing.assert_close(mine.weight.grad.double(), theirs.weight.grad, rtol=1e-4, atol=1e-6)
        c_attn = truth.transformer.h[0].attn.c_attn.weight.grad.t()
        torch.testing.assert_close(model.h[0].c_attn.weight.grad.double(), c_attn, rtol=1e-4, atol=1e-6)


def test_a_peers_step_clips_and_decays_as_ours_does(monkeypatch):
    """The losses of gpt2_fast and nanoGPT agree to float32's rounding, at a rate, decay and clip that all show."""
    for name, value in {"LEARNING_RATE": 3e-3, "WEIGHT_DECAY": 1.0, "CLIP": 0.5}.items():
        monkeypatch.setattr(programs, name, value)
    setting = Setting("smoke", torch.float32, "cpu", 2, 16)
    losses = {}
    for name in ("gpt2_fast", "nanogpt"):
        step, data = PROGRAMS[name].build(setting), batch(setting)
        losses[name] = [step(*data).item() for _ in range(5)]
    assert losses["gpt2_fast"] == pytest.approx(losses["nanogpt"], rel=2e-6)


def test_a_worker_that_fails_is_told_in_one_line_and_left_out():
    with pytest.raises(measure.ProgramFailed, match=r"^status 2: .*error: .*(No such file|unrecognized)"):
        measure.run_worker("json.tool", {"no_such_option": 3, "left_out": None}, timeout=60)

    def run(name, index):
        if name == "bad" and index == 1:
            raise measure.ProgramFailed("out of memory")
        return {"name": name}

    rounds = measure.alternate(["good", "bad"], 2, run, lambda *_: "")
    assert next(rounds) == ({"good": [{"name": "good"}], "bad": [{"name": "bad"}]}, {})
    assert next(rounds) == ({"good": [{"name": "good"}] * 2}, {"bad": "out of memory"})
    assert list(rounds) == []


def test_a_run_that_is_cut_off_keeps_its_whole_rounds(tmp_path, monkeypatch):
    def run(module, options, timeout, environment=None):
        if options["name"] == "product-peak":
            return {"flops_per_second": 1e9, "edge": 128}
        started.append(options["name"])
        if len(started) == 4:
            raise KeyboardInterrupt
        return {"seconds": [0.5], "losses": [11.0], "first_step_seconds": 1.0, "peak_bytes": 1, "launches": 1}

    started = []
    monkeypatch.setattr(measure, "run_worker", run)
    arguments = ("--dtype", "float32", "--programs", "gpt2_fast,nanogpt", "--device", "cpu", "--rounds", "3")
    with pytest.raises(KeyboardInterrupt):
        train.main([*SMOKE, *arguments, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["setting"]["rounds"] == 1
    assert [(row["name"], len(row["rounds"])) for row in record["rows"]] == [("gpt2_fast", 1), ("nanogpt", 1)]


def test_mfu_is_of_the_fastest_large_product_of_all_rounds(tmp_path, monkeypatch):
    def run(module, options, timeout, environment=None):
        if options["name"] == "product-peak":
            return {"flops_per_second": rates.pop(0), "edge": 128}
        return {"seconds": [0.5], "losses": [11.0], "first_step_seconds": 1.0, "peak_bytes": 1, "launches": 1}

    rates = [1e9, 3e9, 2e9]
    monkeypatch.setattr(measure, "run_worker", run)
    arguments = ("--dtype", "float32", "--programs", "gpt2_fast", "--device", "cpu", "--rounds", "3")
    assert train.main([*SMOKE, *arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["peaks"]["float32"]["flops_per_second"] == 3e9


def test_spread_and_ratio():
    assert measure.spread([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    assert measure.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert measure.ratio([10.0, 30.0, 8.0], [5.0, 10.0, 8.0]) == 2.0


def test_profile_counts_the_arithmetic_of_the_step(monkeypatch):
    """Calls by layer, and the FLOPs of all products: 6 a token and weight of the matrices that multiply."""
    monkeypatch.setattr(profile_step, "floor_seconds", lambda cost, *_: (1e-9 * cost["bytes"], "bytes"))
    setting = Setting("smoke", torch.float32, "cpu", 2, 16)
    result = profile_step.measure_step("gpt2_fast", setting, steps=2)
    ops = {row["op"]: row for row in result["ops"]}
    layers, width, vocabulary, tokens = 2, 64, 512, 32
    assert ops["attention"]["calls"] == ops["attention_backward"]["calls"] == layers
    assert ops[f"linear {width}x{3 * width}"]["calls"] == layers
    assert ops["add_layernorm"]["calls"] == layers + 1
    assert ops["mlp"]["calls"] == ops["mlp_backward"]["calls"] == layers
    assert ops["adamw"]["calls"] == ops["linear_cross_entropy"]["calls"] == 1
    products = sum(row["flops"] for op, row in ops.items() if op.startswith(("linear", "mlp")))
    assert products == 6 * tokens * (layers * 12 * width**2 + vocabulary * width)
    assert all(row["seconds"] >= row["product_seconds"] >= 0 for row in ops.values())
    assert ops["linear_backward 64x64"]["product_seconds"] > 0
    shown = profile_step.text(result)
    assert "largest gaps: " in shown
    assert result["kernels"] == []


def _report(tmp_path, *stages, python="/bin/false"):
    environment = {**os.environ, "PYTHON": python, "OUT": str(tmp_path / "report"), "TESTS": "tests"}
    command = ["bash", "benchmarks/gpu_report.sh", *stages]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_gpu_report_goes_on_after_a_stage_that_fails_and_resumes(tmp_path):
    """With a Python that can do nothing every stage fails or says why not, and what there is gets packed."""
    done = _report(tmp_path)
    assert done.returncode == 1
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if not line.startswith(("MISSING", "/")))
    assert said["check"].startswith("FAILED")
    assert said["build"].startswith("FAILED")
    assert said["tests"] == "skipped: pytest is not installed"
    assert said["sanitizer"] == "skipped: compute-sanitizer needs a GPU"
    assert "MISSING torch: everything" in done.stdout
    assert (tmp_path / "report.tar.gz").exists()
    (tmp_path / "report" / "check.done").touch()
    assert "check: done before" in _report(tmp_path).stdout
    assert "check: FAILED" in _report(tmp_path, "check").stdout  # named, so run again
    unknown = _report(tmp_path, "tests", "lunch")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "no stage 'lunch'; choose of environment build" in unknown.stderr
