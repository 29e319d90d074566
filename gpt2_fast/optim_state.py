"""What AdamW keeps of one parameter p, beside it and placed as it is, a DTensor where it is one:

step        float32 [], the steps that it has taken
exp_avg     running average of its gradients, of p's shape, float32 or wider
exp_avg_sq  running average of their squares, the same
master      of a bfloat16 or float16 p alone: the float32 weight that p is the rounding of
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gpt2_fast.ops.adamw import take_written
from gpt2_fast.ops.adamw_contract import check_shape
from gpt2_fast.ops.runtime.dispatch import LOW_PRECISION

State = dict[str, Tensor]


def complete(state: State, p: Tensor) -> State:
    """`state` with all that it has to have: of a new one zeros, and p as its master."""
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(p, dtype=_wide(p), memory_format=torch.preserve_format)
    if p.dtype not in LOW_PRECISION:
        state.pop("master", None)
    elif "master" not in state:
        state["master"] = p.detach().to(_wide(p))
    return state


def master_of(p: Tensor, state: State) -> Tensor:
    """The weight of p before it was rounded; what is left of an earlier cast says nothing of a float32 one."""
    held = state.get("master") if p.dtype in LOW_PRECISION else None
    if held is None:
        return p.detach().float()
    param, master = dtensors().local(p, held) if is_dtensor(p) else (p, held)
    take_written(master, param)
    return held


def take(state: State, source: dict[str, Any], p: Tensor, i: int) -> None:
    """Puts copies of what is in `source`, a saved state of p, into `state`, and completes it.

    Raises ValueError, which names p by its number i, for another shape.
    """
    step = source["step"] if isinstance(source["step"], Tensor) else torch.tensor(source["step"], device="cpu")
    state["step"] = step.detach().to(p.device, torch.float32, copy=True).reshape(())
    for key in ("exp_avg", "exp_avg_sq", "master"):
        if key in source:
            value = source[key]
            check_shape(key, i, value, p)
            if is_dtensor(p) or is_dtensor(value):
                value = dtensors().spread(value, p)
            state[key] = torch.empty_like(p, dtype=_wide(p)).copy_(value)  # with p's strides
    complete(state, p)


def _wide(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype in LOW_PRECISION else p.dtype


def is_dtensor(t: Tensor) -> bool:
    """Whether a tensor is spread over ranks; torch.distributed.tensor is not imported for it."""
    return hasattr(t, "device_mesh")


def dtensors() -> ModuleType:
    """What is done with those, imported where there is one."""
    from gpt2_fast.parallel import dtensor

    return dtensor
