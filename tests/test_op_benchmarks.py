"""`pytest benchmarks` runs and its numbers parse; cost() is first principles; no test asserts a speed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from gpt2_fast.config import GPT2Config
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.ops import adamw, add_layernorm, attention, embedding, linear, mlp
from gpt2_fast.ops import linear_cross_entropy as head
from gpt2_fast.ops.runtime.dispatch import TABLE

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import roofline  # noqa: E402
from benchmarks.ops import report  # noqa: E402
from benchmarks.ops.harness import SIZES, Size  # noqa: E402


def _bytes(*tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


BROKEN = "linear"
PLUGIN = """
from gpt2_fast.ops import linear
right = linear.linear
linear.linear = lambda x, weight, bias: right(x, weight, bias) * 1.5
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The record of a smoke run in which one op, `linear`, is off by a factor; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("ops")
    (folder / "broken.py").write_text(PLUGIN)
    command = [sys.executable, "-m", "benchmarks", "ops", "--smoke", "--dtypes", "bfloat16", "--out", str(folder)]
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([*command, "-p", "broken"], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), folder, done.stdout


def test_every_op_is_timed_in_every_direction(smoke):
    record, _, printed = smoke
    # decode_step and decode_tokens are a whole model's; mlp is timed up to its GELU too.
    timed = set(TABLE) - {"decode_step", "decode_tokens"} | {"layernorm_linear_gelu"}
    assert {row["op"] for row in record["rows"]} == timed
    for row in record["rows"]:
        assert {"gpt2_fast", "eager"} <= set(row["programs"]) <= {"gpt2_fast", "library", "eager"}
        assert row["direction"] in printed
        for entry in row["programs"].values():
            seconds = entry["seconds"]
            assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
            assert entry["gb_per_second"] == pytest.approx(row["bytes"] / seconds["median"] / 1e9)
            (floor,) = entry["floors"]
            assert entry["percent_of_ceiling"] == pytest.approx(100 * floor / seconds["median"])
    directions = {(row["op"], row["direction"]) for row in record["rows"]}
    assert {("attention", "forward"), ("attention", "backward"), ("adamw", "step")} <= directions


def test_no_speed_is_reported_where_the_check_is_red(smoke):
    record, _, printed = smoke
    assert printed.count("wrong, so no speed is reported") >= 2  # forward and backward
    assert f"bench_{BROKEN}" in printed
    for row in record["rows"]:
        ours, eager = row["programs"]["gpt2_fast"], row["programs"]["eager"]
        if row["op"] == BROKEN:
            assert "error" in ours["wrong"]
            assert "gpt2_fast_speedup" not in eager
        else:
            assert not ours["wrong"]
            assert eager["gpt2_fast_speedup"] > 0


def test_the_record_says_where_it_was_made(smoke):
    record, folder, _ = smoke
    assert record["machine"]["versions"]["torch"]
    assert record["command"] == "pytest benchmarks --smoke --dtypes bfloat16 -p broken"
    assert record["copy_gb_per_second"] > 0
    assert set(record["product_tflop_per_second"]) == {"float32", "bfloat16"}
    (chart,) = folder.glob("*.png")
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_share_is_of_the_machine_as_it_was_in_that_turn():
    """It was slower in another program's turns, for that program and for what bounds it."""
    row = report.new_row("attention", "[1]", "float32", "forward", {"bytes": 1000, "flops": 10})
    for program, slower in (("gpt2_fast", 1), ("eager", 4), ("gpt2_fast", 2), ("eager", 4)):
        report.add(row, program, program, "", [slower * 2e-3], slower * 1e-3)
    report.finish(row)
    assert {entry["percent_of_ceiling"] for entry in row["programs"].values()} == {50.0}
    assert row["floor_seconds"] == 3e-3


def test_a_wrong_op_has_no_speedup():
    """Neither in the figures nor in the table: what is wrong says so, what is right is timed on."""
    cost = {"bytes": 1000, "flops": 10}
    rows = []
    for wrong in ("", "gradient 0: error 1"):
        row = report.new_row("attention", "[1]", "float32", "forward", cost) | {"bound": "bytes"}
        report.add(row, "gpt2_fast", "gpt2_fast", wrong, [2e-3, 2e-3], 1e-3)
        report.add(row, "eager", "eager", "", [6e-3, 8e-3], 1e-3)
        rows.append(report.finish(row))
    assert rows[0]["programs"]["eager"]["gpt2_fast_speedup"] == pytest.approx(3.5)
    assert rows[0]["programs"]["gpt2_fast"]["percent_of_ceiling"] == pytest.approx(50)
    assert "gpt2_fast_speedup" not in rows[1]["programs"]["eager"]
    versions = {"device": "here", "threads": 1, "versions": {"torch": "2"}}
    printed = list(report.table({"machine": versions, "copy_gb_per_second": 1.0, "product_tflop_per_second": {},
                                 "rows": rows[1:]}))  # fmt: skip
    assert any(line.endswith("WRONG: gradient 0: error 1") for line in printed)
    assert not any(line.endswith("x") for line in printed)


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cost_of_add_layernorm_is_its_inputs_and_outputs(dtype):
    N, C = 6, 32
    x, residual = torch.randn(2, N, C).to(dtype).unbind(0)
    weight, bias = torch.randn(2, C).to(dtype).unbind(0)
    options = (1e-5, 0.0, None, 0, dtype)
    y, h, mean, rstd = add_layernorm.OP.forward_op(x, residual, weight, bias, *options, True, "cpp")
    cost = add_layernorm.cost(N, C, dtype.itemsize)
    assert cost["forward"]["bytes"] == _bytes(x, residual, weight, bias, y, h, mean, rstd)
    kept = (h, weight, mean, rstd)
    made = add_layernorm.OP.backward_op(y, h, *kept, *options, dtype, True, [True] * 4, "cpp")
    _, dresidual, *dparams = made
    dparams = [d.to(dtype) for d in dparams]
    assert cost["backward"]["bytes"] == _bytes(y, h, h, weight, mean, rstd, dresidual, *dparams)
    alone = add_layernorm.cost(N, C, dtype.itemsize, residual=False)
    assert alone["forward"]["bytes"] == _bytes(x, weight, bias, y, mean, rstd)
    assert alone["backward"]["bytes"] == _bytes(y, x, weight, mean, rstd, dresidual, *dparams)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projects", [False, True])
def test_cost_of_mlp_is_its_inputs_and_outputs(dtype, projects):
    N, C, F = 6, 32, 48
    x, residual = torch.randn(2, N, C).to(dtype).unbind(0)
    ln_weight, ln_bias = torch.randn(2, C).to(dtype).unbind(0)
    weight, bias = torch.randn(C, F).to(dtype), torch.randn(F).to(dtype)
    proj_weight, proj_bias = (torch.randn(F, C).to(dtype), torch.randn(C).to(dtype)) if projects else (None, None)
    parameters = (ln_weight, ln_bias, weight, bias, proj_weight, proj_bias)
    options = (1e-5, 0.0, None, 0, 0)
    m, h, u, f, n, mean, rstd = mlp.OP.forward_op(x, residual, *parameters, *options, True, "cpp")
    assert f.numel() == n.numel() == 0  # made again
    cost = mlp.cost(N, C, F, dtype.itemsize, projects)
    assert cost["forward"]["bytes"] == _bytes(x, residual, *parameters, m, h, u, mean, rstd)
    dm, dh, kept = m, h, (mean, rstd, h, u, None, None, ln_weight, ln_bias, weight, proj_weight)
    needs = [True] * 6 + [projects] * 2
    dx, dresidual, *_ = mlp.OP.backward_op(dm, dh, *kept, *options, dtype, True, needs, "cpp")
    assert dx.numel() == 0  # it is dresidual
    # The gradients of the parameters have their shapes.
    assert cost["backward"]["bytes"] == _bytes(dm, dh, *kept, dresidual, *parameters)
    products = 2 if projects else 1
    assert cost["forward"]["flops"] == products * 2 * N * C * F
    assert cost["backward"]["flops"] == 2 * cost["forward"]["flops"]  # dweight and dx of each


@pytest.mark.parametrize("dtype", DTYPES)
def test_cost_of_attention_is_its_inputs_and_outputs_and_visible_pairs(dtype):
    B, T, H, D = 2, 5, 3, 16
    qkv = torch.randn(B, T, 3, H, D).to(dtype)
    options = (None, 0.0, None, 0)
    out, lse = attention.OP.forward_op(qkv, None, *options, True, "cpp")
    cost = attention.cost(B, T, H, D, dtype.itemsize)
    assert cost["forward"]["bytes"] == _bytes(qkv, out, lse)
    dqkv = attention.OP.backward_op(out, qkv, None, out, lse, *options, [True, False], "cpp")
    assert cost["backward"]["bytes"] == _bytes(out, qkv, out, lse, dqkv)
    pairs = B * H * int(attention.visible_keys(T, None, qkv.device).sum())
    assert cost["forward"]["flops"] == pairs * 2 * (2 * D)  # Q K^T and P V, a multiply and an add each
    assert cost["backward"]["flops"] == pairs * 5 * (2 * D)  # S again, dP, dV, dQ, dK
    S = 7
    cache = torch.randn(B, H, S, D).to(dtype)
    starts = torch.zeros(B, dtype=torch.int32)
    decode = attention.decode_cost(B, H, S, D, dtype.itemsize)["forward"]
    q = cache[:, :, 0]
    assert decode["bytes"] == _bytes(q, cache, cache, starts, starts, q)
    assert decode["flops"] == B * H * S * 2 * (2 * D)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cost_of_linear_and_head_is_their_inputs_and_outputs(dtype):
    N, n_in, n_out = 6, 32, 48
    x, weight, bias, y = (torch.randn(s).to(dtype) for s in ((N, n_in), (n_in, n_out), (n_out,), (N, n_out)))
    cost = linear.cost(N, n_in, n_out, dtype.itemsize)
    assert cost["forward"]["bytes"] == _bytes(x, weight, bias, y)
    assert cost["backward"]["bytes"] == _bytes(y, x, weight) + _bytes(x, weight, bias)  # read, and their gradients
    labels, loss = torch.zeros(N, dtype=torch.int64), torch.zeros(())
    cost = head.cost(N, n_in, n_out, dtype.itemsize)
    assert cost["forward"]["bytes"] == _bytes(x, weight, labels, loss)
    assert cost["backward"]["bytes"] == _bytes(x, weight)  # dx and dweight
    for room, shape in product((linear, head), ((N, n_in, n_out, 4),)):
        assert room.cost(*shape)["forward"]["flops"] == 2 * N * n_in * n_out
        assert room.cost(*shape)["backward"]["flops"] == 2 * 2 * N * n_in * n_out


@pytest.mark.parametrize("dtype", DTYPES)
def test_cost_of_embedding_and_adamw_is_what_they_touch(dtype):
    B, T, C, V = 2, 5, 32, 50
    ids = torch.zeros(B, T, dtype=torch.int64)
    wte, wpe, h = (torch.randn(s).to(dtype) for s in ((V, C), (T, C), (B * T, C)))
    gathered = h
    cost = embedding.cost(B * T, T, C, V, dtype.itemsize)
    assert cost["forward"]["bytes"] == _bytes(ids, gathered, wpe, h)
    assert cost["backward"]["bytes"] == _bytes(ids, h, wte, wpe)
    n = 100
    param, grad, wide = torch.zeros(n).to(dtype), torch.zeros(n).to(dtype), torch.zeros(n)
    read_and_written = 2 * _bytes(wide, wide, wide)  # exp_avg, exp_avg_sq, weight or master
    copy = 0 if dtype == torch.float32 else 2 * _bytes(param)  # compared with the master, and written
    assert adamw.cost(n, dtype.itemsize)["forward"]["bytes"] == read_and_written + 2 * _bytes(grad) + copy
    assert adamw.cost(n, dtype.itemsize, clip=False)["forward"]["bytes"] == read_and_written + _bytes(grad) + copy


def test_committed_floors_are_what_cost_gives_now():
    document = roofline.DOCUMENT.read_text()
    now = {"floors cpu": roofline.floors(SIZES["cpu"], 4, None),
           "floors h100": roofline.floors(SIZES["cuda"], 2, roofline.H100)}  # fmt: skip
    assert roofline.fill(document, now) == document, "run: python -m benchmarks roofline"


def test_committed_measurements_are_those_of_the_results_they_name():
    document = roofline.DOCUMENT.read_text()
    named = 0
    for section in ("measured cpu", "measured gpu"):
        (written,) = re.findall(rf"<!-- {section} -->(.*?)<!-- end {section} -->", document, re.DOTALL)
        if names := re.findall(r"`results/(\S+?\.json)`", written):
            ops, *train = [roofline.RESULTS / name for name in dict.fromkeys(names)]
            text = roofline.measured_section(ops, train[0] if train else None)
            assert roofline.fill(document, {section: text}) == document, "run: python -m benchmarks roofline"
            named += 1
    assert named, "ROOFLINE.md names no result"


def test_a_missing_marker_is_named():
    with pytest.raises(ValueError, match="ROOFLINE.md has no <!-- floors cpu -->"):
        roofline.fill("# nothing", {"floors cpu": ""})


@pytest.mark.parametrize(("B", "T"), [(4, 256), (16, 1024)])
def test_the_steps_flops_are_six_a_weight_and_token(B, T):
    """6 N for the weights that are multiplied, 14 D for each visible pair of a head; AdamW has every parameter once."""
    size = Size(B, T)
    uses = roofline.step(size, 2)
    with torch.device("meta"):
        parameters = dict(GPT2LMHeadModel(GPT2Config()).named_parameters())
    (updated,) = (u.cost["step"]["bytes"] for u in uses if u.op == "adamw")
    assert updated == adamw.cost(sum(p.numel() for p in parameters.values()), 2)["forward"]["bytes"]
    multiplied = sum(p.numel() for name, p in parameters.items() if p.ndim == 2 and "wpe" not in name)
    products = [u for u in uses if u.op in ("linear", "layernorm_linear_gelu", "linear_cross_entropy")]
    assert sum(u.total("flops") for u in products) == 6 * multiplied * B * T
    (attended,) = (u for u in uses if u.op == "attention")
    assert attended.total("flops") == 12 * 14 * 64 * 12 * B * T * (T + 1) // 2


def test_a_floor_is_the_longer_of_bytes_and_flops():
    peak = {"bytes": 1e9, "flops": 1e12}
    assert roofline._seconds({"bytes": 2_000_000, "flops": 10**9}, peak) == (2e-3, "bytes")
    assert roofline._seconds({"bytes": 2_000_000, "flops": 10**10}, peak) == (1e-2, "flops")
