"""A step computed twice: the same bits, or a fault of memory, device or driver.

A step is deterministic, and draws from no generator. So its state before it (weights, averages, masters) is kept, the
step is taken, the state is put back, and the step is taken again: any bit that differs was not computed but broken.
Beside that, the state is held to its digest of the end of the step before, so that what changed while it lay in memory
is found as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class FaultyMachine(RuntimeError):
    """Two runs of one step differ."""


def bits(t: Tensor) -> Tensor:
    """The bytes of a tensor, as integers."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def digest(tensors: dict[str, Tensor]) -> dict[str, int]:
    """A number for each tensor that another one changes with: sums of its words, plain and by place, modulo 2^64."""
    found = {}
    for name, t in tensors.items():
        raw = bits(t)
        whole = raw[: len(raw) // 8 * 8].view(torch.int64)
        place = torch.arange(1, len(whole) + 1, device=t.device)
        rest = raw[len(whole) * 8 :].to(torch.int64)
        tail = rest * torch.arange(257, 257 + 2 * len(rest), 2, device=t.device)
        found[name] = int((whole * (2 * place + 1)).sum() + tail.sum())
    return found


class Verifier:
    """Takes steps twice.

    Args:
        state: () -> name -> tensor, everything that a step changes, the tensors themselves.
    """

    def __init__(self, state: Callable[[], dict[str, Tensor]]):
        self._state = state
        self._digest: dict[str, int] | None = None

    def rest(self) -> None:
        """Call at the end of the step before one that is verified: what it leaves is held to until then."""
        self._digest = digest(self._state())

    def step(self, take: Callable[[], Tensor], step: int) -> Tensor:
        """`take()`, the loss of step number `step`. Raises FaultyMachine, which names the step and the tensors."""
        known, self._digest = self._digest, None
        if known is not None and (changed := _differing(known, digest(self._state()))):
            raise FaultyMachine(_message(step, changed, "changed in memory between two steps"))
        held = {name: t.detach().clone() for name, t in self._state().items()}
        loss = take().clone()
        for name, t in self._state().items():  # from here on `held` is what the first computation left
            after = t.detach().clone()
            with torch.no_grad():
                t.copy_(held[name]) if name in held else t.zero_()  # what the first step made begins as zeros
            held[name] = after
        again = take().clone()
        changed = [name for name, t in self._state().items() if not torch.equal(bits(t), bits(held[name]))]
        if not torch.equal(bits(loss), bits(again)):
            changed.insert(0, "loss")
        if changed:
            raise FaultyMachine(_message(step, changed, "differ between two computations of it"))
        return loss


def _differing(a: dict[str, int], b: dict[str, int]) -> list[str]:
    return [name for name in a if name in b and a[name] != b[name]]


def _message(step: int, names: list[str], how: str) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"step {step} is not repeatable: {shown} {how}; the memory, the device or its driver is at fault"
