"""Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740), for gradients in float16.

float16 ends at 65504 above and at 6e-8 below, where many gradients lie. So the loss is multiplied by a scale, and with
it every gradient; the step divides by it again. A step with a gradient beyond float16 is left out and halves the scale;
so many steps in a row without one double it. The rule and its numbers are torch.amp.GradScaler's. All of it stays on
the device, so that a CUDA graph holds it and nobody waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000  # as torch.amp.GradScaler
LEAST = 1.0  # below it, gradients are too large for float16 as they are


class LossScale:
    """The scale of a run and how it moves.

    Args:
        device: of the loss.
        initial: the first scale.
        interval: steps in a row without an overflow before the scale grows.

    Attributes:
        scale: float32 [], what the loss is multiplied by: `AdamW.step(grad_scale=scale)`.
    """

    def __init__(self, device: torch.device | str, initial: float = INITIAL, interval: int = INTERVAL):
        self.scale = torch.full((), initial, dtype=torch.float32, device=device)
        self.steps = torch.zeros((), dtype=torch.int32, device=device)  # in a row without an overflow
        self._interval = interval

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call backward on, float32 []."""
        return loss * self.scale

    def update(self, found_inf: Tensor) -> None:
        """Adjusts the scale after a step. found_inf: `AdamW.last_found_inf`."""
        torch._amp_update_scale_(self.scale, self.steps, found_inf, GROWTH, BACKOFF, self._interval)

    def tensors(self) -> dict[str, Tensor]:
        """What a step changes, by name."""
        return {"loss_scale": self.scale, "loss_scale_steps": self.steps}

    def state_dict(self) -> dict[str, float | int]:
        """Numbers on the host, for a checkpoint; it waits for the device."""
        return {"scale": self.scale.item(), "steps": self.steps.item()}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Takes what `state_dict` gave."""
        self.scale.fill_(state["scale"])
        self.steps.fill_(state["steps"])
