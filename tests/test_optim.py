"""gpt2_fast.optim.AdamW beside torch.optim.AdamW, and in the places an optimizer is used."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import DEVICE
from numerics import assert_same_bits

from gpt2_fast.ops import adamw as room
from gpt2_fast.optim import AdamW

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
    return layers.to(DEVICE, dtype)


def _run(model, optimizer, steps, *, clip=None, scheduler=None, start=0):
    for i in range(start, start + steps):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(i)).to(next(model.parameters()))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("maximize", [False, True])
def test_hundred_steps_equal_torchs(maximize):
    """With clipping, here inside the step, and a schedule; one group without decay."""
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        model = _model()
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0, "lr": 1e-3},
        ]
        extra = {"clip_grad_norm": 0.05} if kind is AdamW else {}
        optimizer = kind(groups, **OPTIONS, **extra, maximize=maximize)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 10))
        results.append(_run(model, optimizer, 100, clip=None if extra else 0.05, scheduler=schedule))
    _close(*results)


def test_without_clipping_and_after_torchs_clip_grad_norm():
    for clip in (None, 0.05):
        ours, theirs = _model(), _model()
        expected = _run(theirs, torch.optim.AdamW(theirs.parameters(), **OPTIONS), 20, clip=clip)
        optimizer = AdamW(ours.parameters(), **OPTIONS)
        _close(_run(ours, optimizer, 20, clip=clip), expected)
        assert optimizer.last_grad_norm is None


def test_a_group_that_lacks_an_option_gets_the_optimizers():
    """As of a state of torch's AdamW from before it had the option."""
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        model = _model()
        optimizer = kind(model.parameters(), **OPTIONS)
        _run(model, optimizer, 2)
        state = copy.deepcopy(optimizer.state_dict())
        del state["param_groups"][0]["maximize"]
        other = kind(model.parameters(), **OPTIONS)
        other.load_state_dict(state)
        assert other.param_groups[0]["maximize"] is False
        results.append(_run(model, other, 3))
    _close(*results)


def test_last_grad_norm():
    model = _model()
    optimizer = AdamW(model.parameters(), **OPTIONS, clip_grad_norm=float("inf"))
    assert optimizer.last_grad_norm is None
    _run(model, optimizer, 1)
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(optimizer.last_grad_norm, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_follows_a_float32_master(dtype):
    """Gradients rounded, weights not: 200 steps too small for the parameter's own precision still move it."""
    p = torch.nn.Parameter(torch.ones(50, device=DEVICE, dtype=dtype))
    q = torch.nn.Parameter(torch.ones(50, device=DEVICE))
    ours = AdamW([p], lr=1e-5, weight_decay=0.0)
    theirs = torch.optim.AdamW([q], lr=1e-5, weight_decay=0.0)
    for i in range(200):
        gradient = torch.randn(50, generator=torch.Generator().manual_seed(i)).add(2.0).to(DEVICE, dtype)
        p.grad, q.grad = gradient, gradient.float()
        ours.step()
        theirs.step()
    _close(ours.state[p]["master"], q.detach())
    assert torch.equal(p.detach(), ours.state[p]["master"].to(dtype))
    assert ours.state[p]["exp_avg"].dtype == torch.float32


def _load(model, saved):
    model.load_state_dict(saved)


def _zero(model, saved):
    with torch.no_grad():
        model[0].weight[1::2].zero_()


def _clamp(model, saved):
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.05, 0.05)


def _assign_data(model, saved):
    for p, old in zip(model.parameters(), saved.values(), strict=True):
        p.data = old.clone()


def _copy_into_data(model, saved):
    for p, old in zip(model.parameters(), saved.values(), strict=True):
        p.data.copy_(old)


WRITES = [_load, _zero, _clamp, _assign_data, _copy_into_data]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_weights_that_were_written_between_steps_are_begun_from(write, dtype, impl):
    """Element by element; what was not written goes on from its master, and averages go on."""
    model = _model(dtype)
    saved = copy.deepcopy(model.state_dict())
    optimizer = AdamW(model.parameters(), **OPTIONS, impl=impl)
    _run(model, optimizer, 3)
    old = [p.detach().clone() for p in model.parameters()]
    masters = [optimizer.state[p].get("master", p).detach().clone() for p in model.parameters()]
    averages = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    write(model, saved)
    written = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.0
    assert_same_bits(_run(model, optimizer, 1), written)
    for p, before, now, master, average in zip(model.parameters(), old, written, masters, averages, strict=True):
        expected = torch.where(before == now, master, now.float())
        assert torch.equal(optimizer.state[p].get("master", p), expected)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], average + 0.1 * (p.grad.float() - average))


def test_a_model_that_is_loaded_after_the_optimizer_wins():
    model, other = _model(torch.bfloat16), _model(torch.bfloat16)
    optimizer, resumed = (AdamW(m.parameters(), **OPTIONS) for m in (model, other))
    _run(model, optimizer, 3)
    first = copy.deepcopy(model.state_dict())
    _run(model, optimizer, 3, start=3)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(first)
    resumed.param_groups[0]["lr"] = 0.0
    assert_same_bits(_run(other, resumed, 1), first.values())


def test_cast_from_one_low_precision_to_another():
    """The masters stay and are rounded once; a weight that was written is its own master."""
    model = _model()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    expected = [p.detach().clone() for p in model.parameters()]
    optimizer.cast(model, torch.bfloat16)
    with torch.no_grad():
        model[0].bias[0] = expected[1][0] = 0.3
    expected[1][0] = model[0].bias[0].float()
    optimizer.cast(model, torch.float16)
    for _ in range(2):
        assert_same_bits([optimizer.state[p]["master"] for p in model.parameters()], expected)
        assert_same_bits([p.detach() for p in model.parameters()], [t.half() for t in expected])
        optimizer.param_groups[0]["lr"] = 0.0
        _run(model, optimizer, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cast_keeps_the_float32_weights(dtype):
    """As masters, of the optimizer's parameters alone; a frozen one and a buffer are rounded and nothing else."""
    model = _model()
    model.register_buffer("scale", torch.rand(3, device=DEVICE))
    model[2].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamW(trained, **OPTIONS)
    assert optimizer.cast(model, dtype) is model
    assert {t.dtype for t in model.state_dict().values()} == {dtype}
    for p, weight in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), weight.to(dtype))
    masters = [optimizer.state[p]["master"] for p in trained]
    assert_same_bits(masters, before[:-1])
    assert set(optimizer.state) == set(trained)

    wide = [torch.nn.Parameter(weight) for weight in before[:-1]]
    theirs = torch.optim.AdamW(wide, **OPTIONS)
    for i in range(20):
        generator = torch.Generator().manual_seed(i)
        for p, q in zip(trained, wide, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(DEVICE, dtype)
            q.grad = p.grad.float()
        optimizer.step()
        theirs.step()
    _close(masters, [q.detach() for q in wide])
    assert all(torch.equal(p.detach(), m.to(dtype)) for p, m in zip(trained, masters, strict=True))


def test_after_cast_an_update_below_half_a_rounding_step_is_seen():
    """On average and at once: 3e-5 between weights 1.2e-4 apart. From rounded masters nothing moves."""
    moved = []
    for keep in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(256, 64, bias=False, device=DEVICE)
        torch.nn.init.uniform_(layer.weight, 0.017, 0.031)
        optimizer = AdamW(layer.parameters(), lr=3e-5, weight_decay=0.0)
        optimizer.cast(layer, torch.bfloat16) if keep else layer.to(torch.bfloat16)
        before = layer.weight.detach().float()
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        moved.append((before - layer.weight.detach().float()).mean().item())
    assert moved[0] == pytest.approx(3e-5, rel=0.05)
    assert moved[1] == 0.0


def test_cast_in_the_middle_of_a_run():
    """From float32, and again from bfloat16: averages, step counts and masters go on."""
    straight, model = _model(), _model()
    reference = torch.optim.AdamW(straight.parameters(), **OPTIONS)
    optimizer = AdamW(model.parameters(), **OPTIONS)
    _run(straight, reference, 10)
    expected = _run(model, optimizer, 10)
    _close(expected, [p.detach() for p in straight.parameters()])
    for _ in range(2):
        optimizer.cast(model, torch.bfloat16)
        assert_same_bits([optimizer.state[p]["master"] for p in model.parameters()], expected)
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    reference.step()
    _close([optimizer.state[p]["master"] for p in model.parameters()], [q.detach() for q in straight.parameters()])


def test_state_of_a_cast_model_before_its_first_step():
    model = _model()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    optimizer.cast(model, torch.bfloat16)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = _run(model, optimizer, 5)
    other = _model(torch.bfloat16)
    other.load_state_dict(saved[0])
    resumed = AdamW(other.parameters(), **OPTIONS)
    resumed.load_state_dict(saved[1])
    assert_same_bits(_run(other, resumed, 5), expected)


def test_cast_refuses_what_has_no_master():
    model, other = _model(), _model()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match=f"cast is to {dtype}; a master is kept beside bfloat16 and float16"):
            optimizer.cast(model, dtype)
    with pytest.raises(ValueError, match=r"a parameter \(33, 20\) is not one of the model's"):
        optimizer.cast(other, torch.bfloat16)
    assert {p.dtype for m in (model, other) for p in m.parameters()} == {torch.float32}
    assert not optimizer.state


@pytest.mark.parametrize("kinds", [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW), (AdamW, AdamW)])
def test_state_dict_goes_both_ways(kinds):
    """Ten steps by one class and ten more by another from its state, beside twenty by torch's."""
    straight = _model()
    expected = _run(straight, torch.optim.AdamW(straight.parameters(), **OPTIONS), 20)
    model = _model()
    first = kinds[0](model.parameters(), **OPTIONS)
    _run(model, first, 10)
    second = kinds[1](model.parameters(), lr=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["lr"] == OPTIONS["lr"]
    _close(_run(model, second, 10, start=10), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_run_repeats_to_the_bit(dtype):
    model = _model(dtype)
    optimizer = AdamW(model.parameters(), **OPTIONS, clip_grad_norm=0.1)
    _run(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = _run(model, optimizer, 5, start=5)
    other = _model(dtype)
    other.load_state_dict(saved[0])
    resumed = AdamW(other.parameters(), **OPTIONS, clip_grad_norm=0.1)
    resumed.load_state_dict(saved[1])
    assert_same_bits(_run(other, resumed, 5, start=5), expected)


def test_torchs_low_precision_state_gets_a_master():
    model = _model(torch.bfloat16)
    theirs = torch.optim.AdamW(model.parameters(), **OPTIONS)
    _run(model, theirs, 2)
    optimizer = AdamW(model.parameters(), **OPTIONS)
    optimizer.load_state_dict(theirs.state_dict())
    for p in model.parameters():
        state = optimizer.state[p]
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "master")} == {torch.float32}
        assert torch.equal(state["master"], p.detach().float())


def test_parameter_without_a_gradient_is_left_alone():
    model = _model()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    frozen = model[0].weight
    before = frozen.detach().clone()
    model(torch.randn(4, 20, device=DEVICE)).sum().backward()
    frozen.grad = None
    optimizer.step()
    assert torch.equal(frozen, before)
    assert frozen not in optimizer.state
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()


def test_strided_gradient():
    p, q = (torch.nn.Parameter(torch.ones(6, 4, device=DEVICE)) for _ in range(2))
    p.grad = torch.randn(4, 6, device=DEVICE).t()
    q.grad = p.grad.contiguous()
    AdamW([p], **OPTIONS).step()
    torch.optim.AdamW([q], **OPTIONS).step()
    _close(p.detach(), q.detach())


@pytest.mark.parametrize("make", [lambda t: t.double(), lambda t: t.t().contiguous().t()], ids=["float64", "strides"])
def test_what_kernels_cannot_take_goes_to_the_reference(make):
    """Beside a parameter that they can: one norm over both, and a warning that names the reason."""
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(7, device=DEVICE))]
        params.append(torch.nn.Parameter(make(torch.randn(6, 4, device=DEVICE))))
        optimizer = kind(params, **OPTIONS, **({"clip_grad_norm": 0.5} if kind is AdamW else {}))
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            if kind is AdamW:
                if not optimizer.state:
                    with pytest.warns(UserWarning, match=r"the reference updates the parameter \(6, 4\)"):
                        optimizer.step()
                    continue
            else:
                torch.nn.utils.clip_grad_norm_(params, 0.5)
            optimizer.step()
        results.append([p.detach() for p in params])
    _close(*results)
    named = AdamW([params[1]], **OPTIONS, impl="cpp" if DEVICE == "cpu" else "triton")
    with pytest.raises(ValueError, match=r"cannot update a parameter \(6, 4\)"):
        named.step()


def test_closure_and_added_group():
    model = _model()
    optimizer = AdamW(model[0].parameters(), **OPTIONS)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.01})

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 20, device=DEVICE)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > optimizer.step(closure).item()
    assert all(optimizer.state[p]["step"] == 2 for p in model.parameters())


def test_changed_hyperparameters_are_uploaded():
    p = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
    optimizer = AdamW([p], lr=0.0, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert not p.any()
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, -0.25))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("clip_grad_norm", 1.0, ValueError, "a param group has its own clip_grad_norm"),
        ("impl", "cpp", ValueError, "a param group has its own impl"),
        ("amsgrad", True, ValueError, "amsgrad is not implemented"),
        ("differentiable", True, ValueError, "differentiable is not implemented"),
        ("betas", (1.5, 0.9), ValueError, r"betas are \(1.5, 0.9\)"),
        ("betas", (0.9,), TypeError, r"betas are \(0.9,\); pass two numbers"),
        ("betas", 0.9, TypeError, "betas are 0.9; pass two numbers"),
        ("betas", (0.9, "0.99"), TypeError, "one of betas is '0.99', a str; pass a number"),
        ("lr", float("nan"), ValueError, "lr is nan"),
        ("lr", -1.0, ValueError, "lr is -1.0"),
        ("lr", "1e-4", TypeError, "lr is '1e-4', a str; pass a number"),
        ("lr", "fast", TypeError, "lr is 'fast', a str; pass a number"),
        ("lr", None, TypeError, "lr is None, a NoneType; pass a number"),
        ("eps", float("nan"), ValueError, "eps is nan"),
        ("weight_decay", [0.1], TypeError, r"weight_decay is \[0.1\], a list"),
    ],
)
def test_what_a_group_may_not_have(name, value, error, message):
    """At once, where it is given; at the next step, where it is set later. No weight changes, no step is counted."""
    p = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
    with pytest.raises(error, match=message):
        AdamW([{"params": [p], name: value}])
    for steps in (0, 1):
        optimizer = AdamW([p])
        p.grad = torch.ones_like(p)
        for _ in range(steps):
            optimizer.step()
        optimizer.param_groups[0][name] = value
        before = p.detach().clone()
        with pytest.raises(error, match=message):
            optimizer.step()
        assert torch.equal(p.detach(), before)
        assert optimizer.state[p].get("step", 0) == steps
    optimizer = AdamW([p])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros_like(p))], name: value})
    assert len(optimizer.param_groups) == 1


def test_what_is_not_an_adamws_state_is_named():
    p = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
    p.grad = torch.ones_like(p)
    fix = "pass what state_dict.. of this class or of torch.optim.AdamW gave"
    optimizer = AdamW([p])
    before = optimizer.state_dict()
    for other, message in [
        (torch.optim.SGD([p], momentum=0.9), "group 0 of the state has no betas, so it is another optimizer's"),
        (torch.optim.SGD([p]), "group 0 of the state has no betas"),
        (torch.optim.Adamax([p]), "state of parameter 0 has step, exp_avg, exp_inf and no exp_avg_sq"),
    ]:
        other.step()
        with pytest.raises(ValueError, match=f"{message}.*; {fix}"):
            optimizer.load_state_dict(other.state_dict())
    for state in ({}, {"weight": p.detach()}, None):
        with pytest.raises(ValueError, match=f"load_state_dict was given no optimizer's state; {fix}"):
            optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before


def test_torchs_flags_are_accepted():
    """Those without effect give the same step; those that are not implemented are named."""
    results = []
    for flags in ({}, {"fused": True}, {"foreach": True}, {"capturable": True}, {"amsgrad": False, "fused": None}):
        model = _model()
        optimizer = AdamW(model.parameters(), **OPTIONS, differentiable=False, **flags)
        results.append(_run(model, optimizer, 2))
        torch.optim.AdamW(model.parameters()).load_state_dict(optimizer.state_dict())
    for result in results[1:]:
        assert_same_bits(result, results[0])
    p = torch.nn.Parameter(torch.zeros(3))
    for flag in ("amsgrad", "differentiable"):
        with pytest.raises(ValueError, match=f"{flag} is not implemented"):
            AdamW([p], **{flag: True})
        with pytest.raises(ValueError, match=f"{flag} is not implemented"):
            AdamW([{"params": [p], flag: True}])
    with pytest.raises(ValueError, match="foreach and fused are both True"):
        AdamW([p], foreach=True, fused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "master"])
def test_a_saved_state_of_another_shape_is_named(dtype, key):
    if key == "master" and dtype == torch.float32:
        dtype = torch.float16
    model = _model(dtype)
    optimizer = AdamW(model.parameters(), **OPTIONS)
    _run(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][2][key] = saved["state"][2][key][:2]
    with pytest.raises(
        ValueError, match=rf"{key} of parameter 2 is \(2, 33\) in the state; the parameter is \(5, 33\)"
    ):
        AdamW(model.parameters(), **OPTIONS).load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_state_with_other_strides_goes_on(dtype):
    results = []
    for strided in (False, True):
        model = _model(dtype)
        optimizer = AdamW(model.parameters(), **OPTIONS)
        _run(model, optimizer, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        if strided:
            for state in saved["state"].values():
                for key in {"exp_avg", "exp_avg_sq", "master"} & set(state):
                    state[key] = torch.stack([state[key]] * 2, -1)[..., 0]
        optimizer = AdamW(model.parameters(), **OPTIONS)
        optimizer.load_state_dict(saved)
        results.append(_run(model, optimizer, 2, start=2))
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_state_that_was_only_looked_at_is_none(dtype):
    """`optimizer.state` makes an empty one of a parameter that it is asked for, here and in torch."""
    results = []
    for looks in (False, True):
        model = _model(dtype)
        saved = torch.optim.AdamW(model.parameters())
        for p in model.parameters() if looks else ():
            assert saved.state[p] == {}
        optimizer = AdamW(model.parameters(), **OPTIONS)
        optimizer.load_state_dict(saved.state_dict())
        results.append(_run(model, optimizer, 2))
    assert_same_bits(*results)


def test_a_cast_after_float32_steps_takes_the_float32_weights():
    """Not the masters that an earlier cast left, which those steps did not move."""
    model = _model()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    optimizer.cast(model, torch.bfloat16)
    _run(model, optimizer, 1)
    model.float()
    weights = _run(model, optimizer, 3)
    optimizer.cast(model, torch.bfloat16)
    assert_same_bits([optimizer.state[p]["master"] for p in model.parameters()], weights)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_named_implementation_updates(impl, monkeypatch):
    called = []
    original = room.adamw_reference
    monkeypatch.setattr(room, "adamw_reference", lambda *a, **k: (called.append(1), original(*a, **k))[1])
    model = _model()
    _run(model, AdamW(model.parameters(), **OPTIONS, impl=impl), 1)
    assert bool(called) == (impl == "reference")


def test_bad_input_is_named():
    p = torch.nn.Parameter(torch.zeros(4, 3, device=DEVICE))
    for options, message in [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": torch.tensor(0.1)}, "lr is a tensor"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm is 0.0"),
        ({"lr": "1e-3"}, "lr is '1e-3', a str; pass a number"),
        ({"clip_grad_norm": "1"}, "clip_grad_norm is '1', a str; pass a number"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            AdamW([p], **options)
    with pytest.raises(ValueError, match="parameters are on cpu, meta|parameters are on cuda:0, meta"):
        AdamW([p, torch.nn.Parameter(torch.zeros(3, device="meta"))])
    with pytest.raises(ValueError, match="amsgrad is not implemented"):
        AdamW([p]).load_state_dict(torch.optim.AdamW([p], amsgrad=True).state_dict())
    p.grad = torch.zeros(4, 3, device=DEVICE).to_sparse()
    with pytest.raises(ValueError, match="a gradient is sparse"):
        AdamW([p]).step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_alike(copied, dtype):
    """Of model and optimizer together."""
    model = _model(dtype)
    optimizer = AdamW(model.parameters(), **OPTIONS, clip_grad_norm=0.05, impl="reference")
    _run(model, optimizer, 2)
    model2, optimizer2 = copied((model, optimizer))
    assert (optimizer2.clip_grad_norm, optimizer2.impl) == (0.05, "reference")
    assert_same_bits(_run(model, optimizer, 2, start=2), _run(model2, optimizer2, 2, start=2))
