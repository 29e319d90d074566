"""The optimizer's later steps, in which the contract looks at gradients alone: as right and as strict as its first."""

from __future__ import annotations

import pytest
import torch

from gpt2_fast import AdamW
from gpt2_fast.ops import adamw as room

SHAPES = [(3, 5), (7,), (0,), (4, 4)]


@pytest.fixture
def checked(monkeypatch):
    """How often the whole contract was looked at."""
    calls = []
    whole = room.check
    monkeypatch.setattr(room, "check", lambda *lists: calls.append(1) or whole(*lists))
    return calls


def _params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def _gradients(step: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]


def _steps(params, optimizer, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        for p, g in zip(params, _gradients(step, params[0].dtype), strict=True):
            p.grad = g
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_later_steps_have_the_bits_of_whole_ones(dtype, checked, monkeypatch):
    kept, whole = _params(dtype), _params(dtype)
    _steps(kept, AdamW(kept, lr=0.1, clip_grad_norm=0.5), 6)
    assert len(checked) == 1
    monkeypatch.setattr(room.Kept, "take", lambda *_: None)
    _steps(whole, AdamW(whole, lr=0.1, clip_grad_norm=0.5), 6)
    assert len(checked) == 7
    for p, q in zip(kept, whole, strict=True):
        assert torch.equal(p, q)


def _data(p, optimizer):
    p.data = p.data.clone()


def _data_with_strides(p, optimizer):
    p.data = p.data.t().contiguous().t()


def _state(p, optimizer):
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()


def _step(p, optimizer):
    optimizer.state[p]["step"] = optimizer.state[p]["step"].clone()


def _whole_state(p, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def _group(p, optimizer):
    group = optimizer.param_groups[0]
    group["params"] = [q for q in group["params"] if q is not p]
    optimizer.add_param_group({"params": [p], "lr": 0.01})


def _other_group(p, optimizer):
    """The same tensors in the same order."""
    first, second = optimizer.param_groups
    first["params"].append(second["params"].pop(0))


@pytest.mark.filterwarnings("ignore:AdamW. the reference updates")
@pytest.mark.parametrize("change", [_data, _data_with_strides, _state, _step, _whole_state, _group, _other_group])
def test_what_moved_is_looked_at_again(change, checked):
    """And the result is torch's."""
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        params = _params()
        optimizer = kind(params, lr=0.1)
        if change is _other_group:
            optimizer.param_groups[0]["params"] = params[:1]
            optimizer.add_param_group({"params": params[1:], "lr": 0.01})
        _steps(params, optimizer, 3)
        change(params[0], optimizer)
        before = len(checked)
        _steps(params, optimizer, 2, first=3)
        if kind is AdamW:
            assert len(checked) > before
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        torch._neg_view,
        lambda g: torch.complex(g, g).conj().imag,
        lambda g: torch._efficientzerotensor(g.shape),
        lambda g: g.t().contiguous().t(),
        lambda g: g[:1].expand(g.shape),
    ],
    ids=["negated lazily", "imaginary", "zeros without memory", "strides", "expanded"],
)
def test_a_later_gradient_is_read_as_it_is(make):
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        params = _params()
        optimizer = kind(params, lr=0.1)
        _steps(params, optimizer, 2)
        for p, g in zip(params, _gradients(2), strict=True):
            p.grad = make(g) if p.ndim == 2 else g
        optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def _upon_its_parameter(p, state):
    p.grad = p.detach().view(p.shape)


def _upon_an_average(p, state):
    p.grad = state["exp_avg_sq"].view(p.shape)


def _upon_a_part(p, state):
    p.grad = torch.as_strided(state["exp_avg"], p.shape, (5, 1), state["exp_avg"].storage_offset())


@pytest.mark.parametrize("lay", [_upon_its_parameter, _upon_an_average, _upon_a_part])
def test_a_later_gradient_that_is_written_over_is_refused(lay):
    params = _params()
    optimizer = AdamW(params, lr=0.1)
    _steps(params, optimizer, 2)
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, _gradients(2), strict=True):
        p.grad = g
    lay(params[0], optimizer.state[params[0]])
    with pytest.raises(ValueError, match="shares memory with"):
        optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, old)


def test_a_later_gradient_that_lies_beside_is_taken(checked):
    """Its first byte is the one behind what is written, and its last the one before."""
    values = torch.zeros(3, 8)
    params = [torch.nn.Parameter(values[1])]
    optimizer = AdamW(params, lr=0.1)
    for row in (0, 2, 0):
        params[0].grad = values[row].fill_(1.0)
        optimizer.step()
    assert (values[1] < -0.29).all()
    assert len(checked) == 1


def test_parameters_without_a_gradient_come_and_go(checked):
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        params = _params()
        optimizer = kind(params, lr=0.1)
        for step in range(6):
            for i, (p, g) in enumerate(zip(params, _gradients(step), strict=True)):
                p.grad = None if i == step % 3 else g
            optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_nothing_of_a_step_is_held():
    """Neither gradients nor, after the optimizer lets them go, averages."""
    import weakref

    params = _params()
    optimizer = AdamW(params, lr=0.1)
    _steps(params, optimizer, 2)
    held = [weakref.ref(params[0].grad), weakref.ref(optimizer.state[params[0]]["exp_avg"])]
    params[0].grad = None
    optimizer.state[params[0]].clear()
    assert [ref() for ref in held] == [None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lists, hyper: (lists, hyper[:1]), "param 1 is in group 1 and hyper has 1"),
        (
            lambda lists, hyper: ((lists[0], [g.double() for g in lists[1]], *lists[2:]), hyper),
            "grad 0 must be a dense",
        ),
        (
            lambda lists, hyper: ((lists[0], [g.view(-1) for g in lists[1]], *lists[2:]), hyper),
            "grad 0 must be a dense",
        ),
        (lambda lists, hyper: ((lists[0], lists[1][1:], *lists[2:]), hyper), "3 grads for 4 params"),
        (lambda lists, hyper: ((lists[0], [None, *lists[1][1:]], *lists[2:]), hyper), "grad 0 is a NoneType"),
        (
            lambda lists, hyper: ((lists[0], [lists[1][0].to_sparse(), *lists[1][1:]], *lists[2:]), hyper),
            "grad 0 is torch.sparse_coo",
        ),
        (
            lambda lists, hyper: (
                (*lists[:2], [lists[2][0].as_strided((3, 5), (1, 3)), *lists[2][1:]], *lists[3:]),
                hyper,
            ),
            "cannot update param 0: its exp_avg",
        ),
    ],
)
def test_a_later_call_is_refused_as_a_first_one(change, message):
    *lists, hyper, options = list(room.samples())[1]
    kept = room.Kept()
    room.adamw(*lists, hyper, **options, kept=kept)
    lists, hyper = change(lists, hyper)
    with pytest.raises((TypeError, ValueError), match=message):
        room.adamw(*lists, hyper, **options, kept=kept)


def _negated(t):
    return torch._neg_view(-t)


def _no_memory(t):
    return torch._efficientzerotensor(t.shape)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("grad_scale", _negated),
        ("found_inf", _negated),
        ("norm", _negated),
        ("found_inf", _no_memory),
        ("norm", _no_memory),
    ],
)
def test_a_later_number_is_read_as_it_is(name, make):
    results = []
    for kept in (room.Kept(), None):
        *lists, hyper, _ = list(room.samples())[1]
        number = torch.full((), 4.0)
        for given in (number, make(number)):
            room.adamw(*lists, hyper, max_norm=0.5, **{name: given}, kept=kept)
        results.append([t for tensors in (lists[0], lists[2]) for t in tensors])
    for t, expected in zip(*results, strict=True):
        assert torch.equal(t, expected)
