"""Generation and evaluation leave the mode of every module as it was, whoever else uses the model."""

from __future__ import annotations

import threading

import pytest
import torch
from test_model import pair, tokens

from gpt2_fast.evaluate import losses
from gpt2_fast.generate import generate
from gpt2_fast.modules import _MODES, evaluating

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
    assert not _MODES
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
    assert not _MODES


def test_two_threads_generate_with_a_model_in_training():
    """The second begins while the first is at it, and ends after it."""
    model = pair()[1]
    before, began, ended = modes(model), threading.Event(), threading.Event()

    def first(token):
        other.start()
        assert began.wait(60)

    def second(token):
        began.set()
        assert ended.wait(60)
        seen.append(model.training)

    seen = []
    other = threading.Thread(target=lambda: generate(model, [[1, 2]], 1, on_token=second))
    generate(model, [[3, 4]], 1, on_token=first)
    ended.set()
    other.join()
    assert seen == [False]
    assert modes(model) == before


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
