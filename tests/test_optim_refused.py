"""A step that AdamW refuses has changed nothing: who repairs the cause and goes on gets what torch gives."""

from __future__ import annotations

import pytest
import torch

from gpt2_fast import AdamW
from gpt2_fast.optim_state import complete

pytestmark = pytest.mark.filterwarnings("ignore:AdamW. the reference updates")
DTYPES = {"kernel": (torch.float32, torch.float32), "two implementations": (torch.float32, torch.float64)}


def _params(dtypes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(4, 4, generator=generator, dtype=dtype)) for dtype in dtypes]


def _set_gradients(params, step):
    generator = torch.Generator().manual_seed(step + 1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def _written_over(params, optimizer):
    params[1].grad = params[1].data


def _an_odd_gradient_beside(params, optimizer):
    params[0].grad = torch._neg_view(params[0].grad)
    params[1].grad = params[1].data


def _an_average_of_another_shape(params, optimizer):
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(3)


def _a_state_of_another(params, optimizer):
    optimizer.state[params[1]]["exp_avg_sq"] = optimizer.state[params[1]]["exp_avg"]


def _state(params, optimizer):
    whole = [[p.detach(), *(optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq", "step"))] for p in params]
    return [t.clone() for tensors in whole for t in tensors]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "spoil", [_written_over, _an_odd_gradient_beside, _an_average_of_another_shape, _a_state_of_another]
)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_refused_step_changes_nothing(spoil, dtypes, clip, after):
    """After so many right ones: of the second on, an optimizer keeps what it found."""
    results = []
    for refuses in (True, False):
        params = _params(dtypes)
        optimizer = AdamW(params, lr=0.1, clip_grad_norm=clip)
        for step in range(after + 2):
            _set_gradients(params, step)
            if refuses and step == after:
                for p in params:
                    complete(optimizer.state[p], p)
                before, state = _state(params, optimizer), {p: dict(optimizer.state[p]) for p in params}
                spoil(params, optimizer)
                with pytest.raises(ValueError, match=r"^adamw: [^\n]*$"):
                    optimizer.step()
                for p in params:
                    optimizer.state[p].update(state[p])
                assert all(map(torch.equal, _state(params, optimizer), before))
                _set_gradients(params, step)
            optimizer.step()
        results.append(_state(params, optimizer))
    assert all(map(torch.equal, *results))


def test_a_refused_scale_changes_nothing():
    params = _params(DTYPES["kernel"])
    optimizer = AdamW(params, lr=0.1)
    _set_gradients(params, 0)
    optimizer.step()
    before = _state(params, optimizer)
    with pytest.raises(ValueError, match="grad_scale is"):
        optimizer.step(grad_scale=torch.ones(2))
    assert all(map(torch.equal, _state(params, optimizer), before))


def test_a_refused_step_under_a_profiler_changes_nothing():
    """Its steps go through torch's dispatcher, to the operator."""
    params = _params(DTYPES["kernel"])
    optimizer = AdamW(params, lr=0.1)
    _set_gradients(params, 0)
    optimizer.step()
    before = _state(params, optimizer)
    params[1].grad = params[1].data
    with torch.autograd.profiler.profile(), pytest.raises(ValueError, match="shares memory"):
        optimizer.step()
    assert all(map(torch.equal, _state(params, optimizer), before))


def test_parameters_of_two_implementations_share_no_memory():
    """One of a kernel and one with strides, which the reference updates."""
    memory = torch.randn(4, 4)
    params = [torch.nn.Parameter(memory[:2]), torch.nn.Parameter(memory.t())]
    optimizer = AdamW(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    before = memory.clone()
    with pytest.raises(ValueError, match=r"^adamw: param \d shares memory with param \d; pass every parameter once"):
        optimizer.step()
    assert torch.equal(memory, before)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_a_compiled_step_is_one_graph(dtypes):
    """None of what is checked beforehand breaks it; its numbers are those of the step itself."""
    runs = []
    for compiled in (False, True):
        params = _params(dtypes)
        optimizer = AdamW(params, lr=1e-2, clip_grad_norm=0.5 if dtypes[0] is dtypes[1] else None)
        step = torch.compile(optimizer.step, backend="eager", fullgraph=True) if compiled else optimizer.step
        for i in range(3):
            _set_gradients(params, i)
            (step if i else optimizer.step)()  # the first makes state, and says what the reference updates
        runs.append(params)
    for plain, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, plain)
