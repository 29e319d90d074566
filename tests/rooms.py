"""The declared operations as the tests that all of them share see them: calls by name, made from a room's samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from conftest import DEVICE
from numerics import ROW_SLACK
from torch import Tensor

from gpt2_fast import ops
from gpt2_fast.ops import attention
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.declare import Op

Arguments = dict[str, Any]  # of one call, by name


class Room(NamedTuple):
    """An operation, its public function, its samples, and which of them Triton's interpreter takes within seconds.

    row_slack: see tests/numerics.py. autocasts: whether it casts inside torch.autocast, where it raises otherwise.
    """

    op: Op
    call: Callable
    samples: Callable
    interpreted: Callable[[Arguments], bool] = lambda arguments: True
    row_slack: float = ROW_SLACK
    autocasts: bool = True

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def impls(self) -> list[str]:
        """Every implementation on this machine's device but the reference."""
        return [i for i in dispatch.implementations(self.name, DEVICE) if i != "reference"]

    @property
    def options(self) -> list[str]:
        """The arguments of a call that are no tensors, without `impl`."""
        inputs = {i.name for i in self.op.inputs}
        return [name for name in inspect.signature(self.call).parameters if name not in inputs and name != "impl"]

    def calls(self, device: str = "cpu", dtype: torch.dtype = torch.float32, impl: str = "auto") -> Iterator[Arguments]:
        """The samples as arguments by name; of Triton in its interpreter the small ones."""
        names = list(inspect.signature(self.call).parameters)
        for *tensors, options in self.samples(device, dtype):
            arguments = dict(zip(names, tensors, strict=False)) | options
            if impl != "triton" or device != "cpu" or self.interpreted(arguments):
                yield arguments

    def tensors(self, arguments: Arguments) -> dict[str, Tensor]:
        """Those of the operation's inputs that are there."""
        return {i.name: t for i in self.op.inputs if isinstance(t := arguments.get(i.name), Tensor)}

    def differentiable(self, arguments: Arguments) -> list[str]:
        """The names of those that have a gradient."""
        return [name for name in self.tensors(arguments) if self.op.gradients and name in self.op.differentiable]

    def of(self, arguments: Arguments, names: list[str], impl: str) -> Callable:
        """The call as a function of the arguments of these names alone."""
        return lambda *values: self.call(**(arguments | dict(zip(names, values, strict=True))), impl=impl)


def _few(name: str, numel: int) -> Callable[[Arguments], bool]:
    return lambda arguments: arguments[name].numel() < numel


# What a room has of its own; every other one is the declaration, the function of its name and `samples()`.
OWN: dict[str, dict[str, Any]] = {
    # Past 64 rows the product is not Triton's.
    "mlp": {"interpreted": lambda a: a["x"].numel() < 1000 or a["x"].shape[0] > 64},
    # dQ and dK are what is left of dP - delta, and delta is made from the rounded output.
    "attention": {"interpreted": _few("qkv", 5000), "row_slack": 0.25},
    "attention_decode": {"samples": attention.decode_samples},
    "block": {"autocasts": False},
    "linear_cross_entropy": {"interpreted": _few("x", 1000)},
}


def _room(module: ModuleType, op: Op) -> Room:
    of_all = {"op": op, "call": getattr(module, op.name), "samples": module.samples}
    return Room(**(of_all | OWN.get(op.name, {})))


ROOMS = [_room(module, op) for module in ops.rooms().values() for op in vars(module).values() if isinstance(op, Op)]
DERIVED = [room for room in ROOMS if room.op.gradients]
