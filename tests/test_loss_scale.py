"""Scaled losses: steps that are left out, GradScaler's hand in AdamW, the scale of a run, float16 from end to end."""

from __future__ import annotations

import functools
import itertools
import json
import math

import pytest
import torch
from conftest import DEVICE
from numerics import assert_as_exact, assert_same_bits
from test_train import corpus, options  # noqa: F401 - corpus is a fixture

from gpt2_fast import AdamW, GPT2Config, GPT2LMHeadModel
from gpt2_fast.ops.adamw import adamw, adamw_reference, samples
from gpt2_fast.ops.runtime.dispatch import LOW_PRECISION
from gpt2_fast.parallel import Group
from gpt2_fast.train import loss_scale, resume_run, start_run
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.log import MetricsLog
from gpt2_fast.train.loss_scale import LossScale
from gpt2_fast.train.step import Step, build_optimizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["reference", "cpp", "triton"] if DEVICE == "cpu" else ["reference", "triton"]
SCALE = 1024.0
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def number(value: float) -> torch.Tensor:
    return torch.tensor(float(value), device=DEVICE)


def clones(lists, dtype=None):
    return [*([t.to(dtype or t.dtype, copy=True) for t in tensors] for tensors in lists[:5]), *lists[5:]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_a_scale_is_divided_out(impl, dtype):
    """The step of scaled gradients is that of the gradients, as exact as the reference: norm, clipping and averages."""
    for *lists, hyper, given in samples(DEVICE, dtype):
        truth = clones(lists, torch.float64)
        if dtype in LOW_PRECISION:  # in float64 the master is the parameter
            truth[0], truth[4] = truth[4], []
        lists[1] = [g * SCALE for g in lists[1]]
        mine, eager = clones(lists), clones(lists)
        scaling = {**given, "grad_scale": number(SCALE), "found_inf": number(0)}
        norm, eager_norm = adamw(*mine, hyper, **scaling, impl=impl), adamw_reference(*eager, hyper, **scaling)
        true_norm = adamw_reference(*truth, hyper, **given)
        if norm is not None:
            assert_as_exact(norm, eager_norm, true_norm, "norm")
        weights = 4 if dtype in LOW_PRECISION else 0
        for at, at_truth in ((2, 2), (3, 3), (weights, 0)):
            for a, e, t in zip(mine[at], eager[at], truth[at_truth], strict=True):
                if a.numel():
                    assert_as_exact(a, e, t, f"{impl} {dtype} list {at}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_step_that_is_left_out_changes_nothing(impl, dtype):
    """Said by found_inf, with and without a scale and a norm, or by a norm that is not finite."""
    said = [{"found_inf": number(1)}, {"found_inf": number(2), "grad_scale": number(8)}]
    for (*lists, hyper, given), found, bad in itertools.product(samples(DEVICE, dtype), said, (1.0, math.nan)):
        lists[1] = [g * bad for g in lists[1]]
        mine = clones(lists)
        adamw(*mine, hyper, **given, **found, impl=impl)
        for kept, tensors in zip(lists[:5], mine[:5], strict=True):
            assert_same_bits(tensors, kept, "after found_inf")
    for (*lists, hyper, given), bad in itertools.product(samples(DEVICE, dtype), (math.inf, -math.inf, math.nan)):
        lists[1] = [g.clone() for g in lists[1]]
        lists[1][-1].view(-1)[-1] = bad
        mine = clones(lists)
        norm = adamw(*mine, hyper, max_norm=given["max_norm"] or math.inf, grad_scale=number(SCALE), impl=impl)
        assert not norm.isfinite()
        for kept, tensors in zip(lists[:1] + lists[2:5], mine[:1] + mine[2:5], strict=True):
            assert_same_bits(tensors, kept, f"after {bad}")


def test_without_a_scale_a_norm_that_is_not_finite_is_seen_in_the_weights():
    """As torch's clip_grad_norm_ has it: only a loss that is scaled is expected to overflow."""
    *lists, hyper, _ = list(samples(DEVICE))[1]
    lists[1][0].view(-1)[0] = math.nan
    adamw(*lists, hyper, max_norm=1.0)
    assert all(p.isnan().all() for p in lists[0] if p.numel())


def test_numbers_that_do_not_fit_are_named():
    *lists, hyper, _ = next(iter(samples(DEVICE)))
    for name in ("grad_scale", "found_inf"):
        for bad in (number(1).double(), torch.ones(2, device=DEVICE)):
            with pytest.raises(ValueError, match=f"adamw: {name} is .*; it must be one float32 number on {DEVICE}"):
                adamw(*lists, hyper, **{name: bad})


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
    return layers.to(DEVICE, dtype)


def backward(layers, i, scale=None):
    """Gradients of step i, whose loss is scaled; those of steps 2 and 3 are beyond what can be scaled."""
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(i)).to(next(layers.parameters()))
    loss = layers(x).square().mean() * (3e38 if i in (2, 3) else 1.0)
    (loss if scale is None else scale(loss)).backward()


def run_scaled(optimizer, layers, steps=7, clip=None):
    """The loop of torch's documents; the scales."""
    scaler, scales = torch.amp.GradScaler(DEVICE, init_scale=64.0, growth_interval=2), []
    for i in range(steps):
        optimizer.zero_grad()
        backward(layers, i, scaler.scale)
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(layers.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_grad_scaler_drives_it_as_it_drives_torchs(clip, impl):
    """Weights, averages, step counts and scales; two of the seven steps are left out."""
    found = []
    for kind, more in ((torch.optim.AdamW, {"fused": True}), (AdamW, {"impl": impl})):
        layers = model()
        optimizer = kind(layers.parameters(), **OPTIONS, **more)
        scales = run_scaled(optimizer, layers, clip=clip)
        states = [optimizer.state[p] for p in layers.parameters()]
        found.append((scales, list(layers.parameters()), states))
        assert not hasattr(optimizer, "found_inf")
    (scales, weights, states), (our_scales, our_weights, our_states) = found
    assert our_scales == scales == [64.0, 128.0, 64.0, 32.0, 32.0, 64.0, 64.0]
    torch.testing.assert_close(our_weights, weights, rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(our_states, states, strict=True):
        assert ours["step"].item() == theirs["step"].item() == 5.0
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-9)


def test_the_rules_numbers_are_grad_scalers():
    theirs, ours = torch.amp.GradScaler("cpu"), LossScale("cpu")
    assert ours.scale.item() == theirs._init_scale
    assert (theirs._growth_factor, theirs._backoff_factor) == (loss_scale.GROWTH, loss_scale.BACKOFF)
    assert (loss_scale.INTERVAL, ours._interval) == (theirs._growth_interval, theirs._growth_interval)


def test_the_host_reads_nothing_of_a_scaled_step(monkeypatch):
    """torch's step with a scaler waits for found_inf; where an optimizer takes it as a tensor, nothing is read."""
    layers = model()
    optimizer, scaler = AdamW(layers.parameters(), clip_grad_norm=1.0), torch.amp.GradScaler(DEVICE)
    backward(layers, 0, scaler.scale)
    for name in ("item", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} of a tensor"))
    scaler.step(optimizer)
    scaler.update()
    monkeypatch.undo()
    assert optimizer.last_found_inf.item() == 0.0


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_scale_of_ones_own_is_as_a_grad_scalers(dtype, clip):
    """`step(grad_scale=...)` finds in the norm what GradScaler finds in each gradient."""
    results = []
    for own in (False, True):
        layers = model()
        optimizer = AdamW(layers.parameters(), **OPTIONS, clip_grad_norm=clip)
        if dtype != torch.float32:
            optimizer.cast(layers, dtype)
        if own:
            scale, found = LossScale(DEVICE, 64.0, 2), []
            for i in range(7):
                optimizer.zero_grad()
                backward(layers, i, scale.scaled)
                optimizer.step(grad_scale=scale.scale)
                found.append(optimizer.last_found_inf.item())
                scale.update(optimizer.last_found_inf)
            assert found == [0, 0, 1, 1, 0, 0, 0]
            assert (optimizer.last_grad_norm is None) == (clip is None)
        else:
            run_scaled(optimizer, layers)
        states = [t for p in layers.parameters() for _, t in sorted(optimizer.state[p].items())]
        results.append([*layers.parameters(), *states])
    assert_same_bits(*([t.detach() for t in result] for result in results), "own scale")


def test_the_norm_is_that_of_the_gradients():
    norms = []
    for scale in (None, number(4096)):
        layers = model()
        optimizer = AdamW(layers.parameters(), clip_grad_norm=0.1)
        backward(layers, 0, None if scale is None else lambda loss, scale=scale: loss * scale)
        optimizer.step(grad_scale=scale)
        norms.append(optimizer.last_grad_norm)
        assert (optimizer.last_found_inf is None) == (scale is None)
    torch.testing.assert_close(*norms)


def test_parameters_of_two_implementations_are_left_out_together():
    """The float64 one is the reference's; the float16 one alone has a gradient that is not finite."""
    layers = [torch.nn.Parameter(torch.ones(5, device=DEVICE, dtype=dtype)) for dtype in (torch.float64, torch.float16)]
    optimizer = AdamW(layers, lr=0.1)
    for value, moves in ((math.inf, False), (1.0, True)):
        layers[0].grad, layers[1].grad = torch.ones_like(layers[0]), torch.full_like(layers[1], value)
        if moves:
            optimizer.step(grad_scale=number(2))
        else:
            with pytest.warns(UserWarning, match="the reference updates"):
                optimizer.step(grad_scale=number(2))
        assert [bool((p != 1).all()) for p in layers] == [moves, moves], value
        assert [optimizer.state[p]["step"].item() for p in layers] == [moves, moves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_shared_step_is_left_out_alike(dtype):
    """`shard` over one process, of one micro-batch: the same weights, averages and counts as without."""
    results = []
    for shared in (False, True):
        layers = model()
        optimizer = AdamW(layers.parameters(), **OPTIONS)
        if dtype != torch.float32:
            optimizer.cast(layers, dtype)
        if shared:
            optimizer.shard(Group(), 1)
        scale = LossScale(DEVICE, 64.0, 2)
        for i in range(5):
            backward(layers, i, scale.scaled)
            if shared:
                optimizer.accumulate()
            optimizer.step(grad_scale=scale.scale)
            scale.update(optimizer.last_found_inf)
            optimizer.zero_grad()
        saved = optimizer.state_dict()["state"]
        states = [t for s in saved.values() for _, t in sorted(s.items())]
        results.append([*(p.detach() for p in layers.parameters()), *states, scale.scale])
    assert_same_bits(*results, "shared")
    layers = model()
    optimizer, scaler = AdamW(layers.parameters()), torch.amp.GradScaler(DEVICE)
    optimizer.shard(Group(), 1)
    backward(layers, 0, scaler.scale)
    optimizer.accumulate()
    with pytest.raises(ValueError, match=r"a GradScaler sees no gradients after shard\(\); call step\(grad_scale"):
        scaler.step(optimizer)


def test_two_scales_at_once_are_refused():
    layers = model()
    optimizer, scaler = AdamW(layers.parameters()), torch.amp.GradScaler(DEVICE)
    backward(layers, 0, scaler.scale)
    with pytest.raises(ValueError, match="within GradScaler.step"):
        scaler.step(optimizer, grad_scale=number(2))


TINY = GPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=32, vocab_size=211)
STEPS = 200


def curve(dtype: str, loss_scale: LossScale | None = None, steps: int = STEPS) -> tuple[list[float], list[int]]:
    """Losses of a tiny model that learns a text of 211 words by heart, and the steps that were left out."""
    config = TrainConfig(steps=STEPS, batch_size=4, context=32, lr=3e-3, warmup=10, dtype=dtype, device=DEVICE)
    torch.manual_seed(1)
    gpt = GPT2LMHeadModel(TINY).to(DEVICE).train()
    step = Step(gpt, build_optimizer(gpt, config), config, 32)
    step.loss_scale = loss_scale or step.loss_scale
    text = torch.randint(211, (1200,), generator=torch.Generator().manual_seed(0))
    losses, skipped = [], []
    for i in range(steps):
        at = torch.randint(1200 - 33, (4,), generator=torch.Generator().manual_seed(i)).tolist()
        rows = torch.stack([text[a : a + 33] for a in at]).to(DEVICE)[None]
        losses.append(step(rows[..., :-1], rows[..., 1:], config.learning_rate(i), i).item())
        found = step.optimizer.last_found_inf
        skipped += [i] if found is not None and found.item() else []
    return losses, skipped


class LeavesOut(LossScale):
    """A scale with which these steps are left out, whatever the dtype."""

    def __init__(self, steps: list[int]):
        super().__init__(DEVICE)
        self.left_out = iter([i in steps for i in range(STEPS)])

    def scaled(self, loss):
        return loss * (math.inf if next(self.left_out) else self.scale)


def test_float16_follows_float32_for_two_hundred_steps():
    """Nearer than bfloat16 does, whose noise is eight times float16's; so does a run that leaves out steps."""
    exact, _ = curve("float32")
    assert exact[-1] < 0.85 * exact[0]
    farthest = lambda losses, exact: max(abs(a - b) for a, b in zip(losses, exact, strict=True))
    rounded, _ = curve("bfloat16")
    losses, skipped = curve("float16")
    assert skipped == []
    assert farthest(losses, exact) < 0.5 * farthest(rounded, exact)
    losses, skipped = curve("float16", LossScale(DEVICE, 2.0**23), steps=60)
    assert len(skipped) > 2
    late, _ = curve("float32", LeavesOut(skipped), steps=60)
    assert farthest(losses, late) < farthest(rounded, exact)


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("more", [{}, {"grad_accum": 2}, {"verify_every": 3}], ids=str)
def test_a_run_in_float16_resumes_to_the_bit(corpus, tmp_path, monkeypatch, more):  # noqa: F811
    """Its scale is saved. The first scale overflows here, so that steps are left out on both sides of the save."""
    monkeypatch.setattr("gpt2_fast.train.step.LossScale", functools.partial(LossScale, initial=2.0**26))
    folder = tmp_path / "tiny"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=32)).save_pretrained(folder)
    given = {"init_from": str(folder), "dtype": "float16", "steps": 6, "batch_size": 2, **more}
    whole = start_run(options(corpus, tmp_path / "whole", **given))
    whole.train()
    first = start_run(options(corpus, tmp_path / "parts", **given))
    stop_after(first, 3)
    first.train()
    resume_run(tmp_path / "parts", {}).train()
    lines = []
    for name in ("whole", "parts"):
        records = MetricsLog(tmp_path / name / "metrics.jsonl").read()
        lines.append([{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records if "loss" in r])
    assert lines[0] == lines[1]
    skipped = [r["skipped"] for r in lines[0]]
    assert any(skipped[:3]), skipped
    assert any(skipped[3:]), skipped
    assert all(("grad_norm" in r) != r["skipped"] for r in lines[0])
    scale = 2.0**26
    for r in lines[0]:
        scale = scale / 2 if r["skipped"] else scale
        assert r["loss_scale"] == scale
    for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    states = [{**run.run_step.tensors()} for run in (whole, resume_run(tmp_path / "parts", {}))]
    assert_same_bits(*([t for _, t in sorted(s.items())] for s in states), "resumed")


def stop_after(run, step):
    """Ends a run behind one of its steps, as a signal does."""
    original = run._periodically

    def periodically(bar):
        original(bar)
        if run.step == step:
            run.ending.stop.asked = "SIGTERM"

    run._periodically = periodically


def test_gradients_that_no_scale_helps_are_one_line(corpus, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("gpt2_fast.train.step.LossScale", functools.partial(LossScale, initial=1.0))
    monkeypatch.setattr(LossScale, "scaled", lambda self, loss: loss * math.inf)
    run = start_run(options(corpus, tmp_path / "run", dtype="float16", steps=3))
    with pytest.raises(FloatingPointError, match=r"beyond float16 at every loss scale .*lower --lr .*--dtype float32"):
        run.train()


def test_a_step_without_gradients_says_nothing_of_an_earlier_one():
    layers = model()
    optimizer = AdamW(layers.parameters())
    backward(layers, 0, lambda loss: loss * math.inf)
    optimizer.step(grad_scale=number(1))
    assert optimizer.last_found_inf.item() == 1.0
    optimizer.zero_grad()
    optimizer.step(grad_scale=number(1))
    assert optimizer.last_found_inf is None
