"""torch.set_default_device is about tensors that a program makes: a model on the CPU computes the same under any."""

# ruff: noqa: F401, F811 - fixtures that are imported

from __future__ import annotations

import copy
import json

import pytest
import torch
from numerics import assert_same_bits
from small_run import data, out, small
from test_default_dtype import losses, shared_steps, steps, texts
from test_model import pair, tokens

from gpt2_fast import AdamW
from gpt2_fast.evaluate import perplexity
from gpt2_fast.evaluate.losses import loglikelihoods
from gpt2_fast.train import resume_run, start_run

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture(autouse=True)
def no_default_afterwards():
    yield
    torch.set_default_device(None)


def scores(model):
    found = [perplexity(model, tokens(1, 40, seed=2)[0].cpu(), context=8)["loss"]]
    sums, matches = loglikelihoods(model, [([3], [5, 9]), ([2, 8], [7])], greedy=True)
    return [torch.tensor(found, dtype=torch.float64, device="cpu"), sums, matches]


def generated(model):
    """As transformers' users ask for it, with padding and a string that ends a text."""
    ids, mask = tokens(2, 5).cpu(), torch.tensor([[0, 0, 1, 1, 1], [1] * 5], device="cpu")
    return [model.generate(ids, mask, max_new_tokens=4, do_sample=sample, seed=3) for sample in (False, True)]


def resumed(model):
    """A step after an optimizer took a state whose count is a number, as older torch saved it."""
    ids, model = tokens(2, 9).cpu(), copy.deepcopy(model)
    optimizers = [AdamW(model.parameters(), lr=1e-2) for _ in range(2)]
    model(ids, labels=ids).loss.backward()
    optimizers[0].step()
    state = optimizers[0].state_dict()
    for held in state["state"].values():
        held["step"] = 1
    optimizers[1].load_state_dict(state)
    optimizers[1].step()
    return [p.detach() for p in model.parameters()]


def test_a_model_on_the_cpu_computes_the_same_under_any_default():
    model, found = pair()[1].cpu(), []
    for device in (None, "meta"):
        torch.set_default_device(device)
        fresh = copy.deepcopy(model)  # packs anew
        found.append([
            *losses("auto"), *losses("reference"), *steps(fresh), *shared_steps(fresh), *texts(fresh),
            *scores(fresh.eval()), *generated(fresh), *resumed(fresh),
        ])  # fmt: skip
    assert_same_bits(*found)


def test_a_run_is_the_same_under_any_default(small, tmp_path):
    found = []
    for device in (None, "meta"):
        torch.set_default_device(device)
        folder = tmp_path / str(device)
        start_run(small(out=str(folder), steps=4, eval_every=2, dropout=0.1, device="cpu")).train()
        resume_run(folder, {"steps": 6}).train()
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        found.append([{name: v for name, v in line.items() if "loss" in name or "norm" in name} for line in lines])
    assert found[0] == found[1]
    assert any(found[0])
