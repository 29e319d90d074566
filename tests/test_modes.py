"""Generation and evaluation leave the mode of every module as it was, whoever else uses the model."""

from __future__ import annotations

import threading

import pytest
import torch
from test_model import pair, tokens

from gpt2_fast.evaluate import losses
from gpt2_fast.generate import generate
from gpt2_fast.modes import _HELD, evaluating

USES = {
    "generate": lambda model: generate(model, [[1, 2, 3]], 3, temperature=0),
    "perplexity": lambda model: losses.perplexity(model, list(range(9))),
}


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("training", [True, False])
def test_every_part_keeps_its_own_mode(use, training):
    """A frozen layer of a model that trains; one that drops in a model that does not, and does not drop meanwhile."""
    model = pair(resid_pdrop=0.5)[1]
    model.eval()
    expected = USES[use](model)
    model.train(training)
    model.transformer.h[0].train(not training)
    model.transformer.h[1].attn.train(not training)
    before = modes(model)
    assert len(set(before.values())) == 2
    found = USES[use](model)
    assert modes(model) == before
    assert not _HELD
    if use == "generate":
        assert found == expected
    else:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_modes_come_back_after_an_error():
    model = pair()[1]
    model.transformer.h[0].eval()
    before = modes(model)

    def stop(token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [[1, 2]], 3, on_token=stop)
    assert modes(model) == before
    assert not _HELD


class _Noisy(torch.nn.Module):
    """A user's own part, which goes by its mode."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, *inputs):
        self.seen.append(self.training)
        return self.inner(*inputs)


def test_two_threads_generate_with_a_part_of_its_own():
    """The second begins while the first is at it, and ends after it: the part is in eval mode for both."""
    model = pair()[1]
    part = model.transformer.h[0].mlp = _Noisy(model.transformer.h[0].mlp)
    before, began, ended = modes(model), threading.Event(), threading.Event()

    def first(token):
        other.start()
        assert began.wait(60)

    def second(token):
        began.set()
        assert ended.wait(60)

    other = threading.Thread(target=lambda: generate(model, [[1, 2]], 2, on_token=second))
    generate(model, [[3, 4]], 1, on_token=first)
    ended.set()
    other.join()
    assert part.seen == [False] * 3
    assert modes(model) == before
    assert not _HELD


@pytest.mark.parametrize("weights", [None, "float32"])
def test_a_step_beside_generation_drops(weights):
    """As it does alone: the same losses from the same seed, and what train() sets stays."""
    model = pair(embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.3)[1]
    x, inside, done = tokens(2, 9), threading.Event(), threading.Event()

    def losses_of_steps():
        torch.manual_seed(0)
        return [model(x, labels=x).loss.item() for _ in range(3)]

    def wait(token):
        inside.set()
        assert done.wait(60)

    def beside(act):
        inside.clear(), done.clear()
        thread = threading.Thread(target=lambda: generate(model, [[1, 2, 3]], 2, on_token=wait, weights=weights))
        thread.start()
        assert inside.wait(60)
        try:
            return act()
        finally:
            done.set()
            thread.join()

    expected = losses_of_steps()
    assert len(set(expected)) == 3
    assert beside(losses_of_steps) == expected
    model.eval()
    beside(model.train)
    assert all(modes(model).values())


def test_a_model_that_trains_generates_what_it_does_in_eval_mode():
    """Without packed weights, and with blocks that are recomputed."""
    model = pair(embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.3)[1]
    model.transformer.gradient_checkpointing = True
    found = generate(model, [[1, 2, 3], [4, 5]], 6, temperature=0)
    model.transformer.h[1].mlp = _Noisy(model.transformer.h[1].mlp)  # nothing is packed, in either mode
    assert found == generate(model.eval(), [[1, 2, 3], [4, 5]], 6, temperature=0)


def test_train_beside_an_evaluation_stays():
    model = pair()[1].eval()
    with evaluating(model):
        model.train()
    assert all(modes(model).values())


def test_models_that_share_a_module():
    """As a wrapper and what it wraps do: the module is in eval mode until neither uses it."""
    inner = pair()[1].transformer.h[0]
    outer = torch.nn.Sequential(inner)
    with evaluating(outer):
        with evaluating(inner):
            assert not inner.attn.training
        assert not inner.attn.training
        assert not outer.training
    assert inner.attn.training
    assert outer.training


def test_modes_are_set_without_train_and_eval():
    """One that merges an adapter in eval() and takes it out in train() is left as it is."""
    model, heard = pair()[1], []
    model.transformer.h[0].train = lambda mode=True: heard.append(mode)
    with torch.no_grad():
        generate(model, [tokens(1, 3)[0].tolist()], 2)
    assert heard == []
