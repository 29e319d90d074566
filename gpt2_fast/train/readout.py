"""What a step says of itself, read without waiting for it.

After each step its loss, its gradient norm and the record of ids outside the vocabulary are copied to pinned memory,
and an event is recorded after the copies. They are read one step later, when the device has long passed the event. The
next replay of a CUDA graph overwrites the device's values, but only after these copies, on the same stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpt2_fast.ops import embedding


class Reading(NamedTuple):
    loss: float
    grad_norm: float | None
    loss_scale: float | None = None  # for the next step; None where the loss is not scaled
    skipped: bool = False  # for a gradient beyond float16


class Readout:
    """Two places in host memory, used in turn: one is read while the other is written.

    Call `queue` after each step and `read` of a step before `queue` is called twice more.
    """

    PLACES = 2

    def __init__(self, device: torch.device):
        self.device, self._cuda = device, device.type == "cuda"
        self._values = [
            torch.zeros(4, dtype=torch.float32, pin_memory=self._cuda, device="cpu") for _ in range(self.PLACES)
        ]
        self._faults = [torch.zeros(embedding.FAULT_WORDS, dtype=torch.int64, pin_memory=self._cuda, device="cpu")
                        for _ in range(self.PLACES)]  # fmt: skip
        self._events = [torch.cuda.Event() if self._cuda else None for _ in range(self.PLACES)]
        self._there = [[False] * 4 for _ in range(self.PLACES)]
        self._next = 0

    def queue(
        self,
        loss: Tensor,
        grad_norm: Tensor | None,
        loss_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> int:
        """Queues the copies on the current stream. Returns the place to `read`."""
        place, self._next = self._next, (self._next + 1) % self.PLACES
        numbers = (loss, grad_norm, loss_scale, found_inf)
        self._there[place] = [number is not None for number in numbers]
        for at, number in enumerate(numbers):
            if number is not None:
                self._values[place][at].copy_(number, non_blocking=True)
        fault = embedding.FAULTS.get(self.device)
        if fault is not None:
            self._faults[place].copy_(fault, non_blocking=True)
        if self._events[place] is not None:
            self._events[place].record()
        return place

    def read(self, place: int) -> Reading:
        """Waits for the event of that step alone. Raises IndexError for an id outside the vocabulary."""
        if self._events[place] is not None:
            self._events[place].synchronize()
        if self._faults[place][0]:
            embedding.check_ids()  # names the id, and clears the record
        numbers = zip(self._values[place].tolist(), self._there[place], strict=True)
        loss, norm, scale, found = (number if there else None for number, there in numbers)
        return Reading(loss, norm, scale, bool(found))
