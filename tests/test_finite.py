"""What is not finite ends a run, and is not saved over what is."""

# ruff: noqa: F401, F811 - fixtures that are imported

from __future__ import annotations

import json

import pytest
import torch
from small_run import data, names, out, small

from gpt2_fast.train import start_run, validation

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.mark.parametrize("more", [{"steps": 1}, {"steps": 3, "save_every": 1}], ids=str)
def test_weights_that_a_step_made_infinite_are_not_saved(small, out, more):
    run = start_run(small(lr=1e38, grad_clip=0.0, **more))
    with pytest.raises(FloatingPointError, match=r"lower --lr \(it was"):
        run.train()
    assert names(out) == []


def test_the_checkpoints_before_stay(small, out):
    """Where the loss says nothing of it yet: a weight breaks behind step 3."""
    run = start_run(small(steps=5, save_every=1, keep=2))
    take = run.run_step

    def call(*arguments):
        loss = take(*arguments).clone()
        if run.step == 2:
            with torch.no_grad():
                run.model.transformer.ln_f.bias[3] = float("nan")
        return loss

    run.run_step = call
    with pytest.raises(FloatingPointError, match=r"transformer\.ln_f\.bias is not finite after step 3, .* not saved"):
        run.train()
    assert names(out) == ["checkpoint-000001", "checkpoint-000002"]
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_gradient_norm_and_a_validation_loss(small, out, monkeypatch):
    run = start_run(small(steps=5))
    queue = run.readout.queue
    run.readout.queue = lambda loss, norm, *more: queue(loss, torch.tensor(float("inf")), *more)
    with pytest.raises(FloatingPointError, match="the gradient norm is inf at step 1; lower --lr"):
        run.train()
    monkeypatch.setattr(validation, "dataset_loss", lambda *_, **more: {"loss": float("nan")})
    with pytest.raises(FloatingPointError, match="the validation loss is nan at step 0; lower --lr"):
        start_run(small(out=str(out) + "2")).train()
    assert (out.with_name("run2") / "metrics.jsonl").read_text() == ""
