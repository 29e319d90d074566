"""Numbers that are not finite end a run, and are not saved over those that are."""

from __future__ import annotations

import math

import torch

from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.loss_scale import LEAST
from gpt2_fast.train.readout import Reading


def check_step(reading: Reading, step: int, config: TrainConfig) -> None:
    """Raises FloatingPointError, one line, for what a step says of itself. A step that was skipped changed nothing."""
    norm = reading.grad_norm
    for name, value in (("loss", reading.loss), ("gradient norm", None if reading.skipped else norm)):
        if value is not None and not math.isfinite(value):
            raise FloatingPointError(f"the {name} is {value} at step {step}; {_advice(step, config)}")
    if reading.loss_scale is not None and reading.loss_scale < LEAST:
        raise FloatingPointError(
            f"gradients are beyond float16 at every loss scale (down to {reading.loss_scale:g} at step {step}); "
            + _advice(step, config)
        )


def check_validation(loss: float, step: int, config: TrainConfig) -> None:
    """Raises FloatingPointError, one line."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss is {loss} at step {step}; {_advice(step, config)}")


def check_weights(model: GPT2LMHeadModel, step: int, config: TrainConfig) -> None:
    """Raises FloatingPointError, one line. One pass over the weights, without a copy: NaN is the largest number too."""
    ends = [torch.stack(torch.aminmax(p.detach())).float() for p in model.parameters()]
    if torch.stack(ends).isfinite().all():
        return
    name = next(name for (name, _), end in zip(model.named_parameters(), ends, strict=True) if not end.isfinite().all())
    raise FloatingPointError(
        f"{name} is not finite after step {step}, which is not saved; go on from the checkpoint before it; "
        + _advice(step, config)
    )


def _advice(step: int, config: TrainConfig) -> str:
    lr = config.learning_rate(max(step - 1, 0))  # of the step that was taken last
    return f"lower --lr (it was {lr:.2e}) or use --dtype float32"
