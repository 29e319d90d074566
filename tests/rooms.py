"""The declared operations as the tests that all of them share see them: calls by name, made from a room's samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from conftest import DEVICE
from numerics import ROW_SLACK
from torch import Tensor

from gpt2_fast.ops import add_layernorm, attention, embedding, linear, mlp
from gpt2_fast.ops import linear_cross_entropy as head
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.declare import Op

Arguments = dict[str, Any]  # of one call, by name


class Room(NamedTuple):
    """An operation, its public function, its samples, and which of them Triton's interpreter takes within seconds.

    row_slack: see tests/numerics.py.
    """

    op: Op
    call: Callable
    samples: Callable
    interpreted: Callable[[Arguments], bool] = lambda arguments: True
    row_slack: float = ROW_SLACK

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def impls(self) -> list[str]:
        """Every implementation on this machine's device but the reference."""
        return [i for i in dispatch.implementations(self.name, DEVICE) if i != "reference"]

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


ROOMS = [
    Room(add_layernorm.OP, add_layernorm.add_layernorm, add_layernorm.samples),
    Room(linear.OP, linear.linear, linear.samples),
    # Past 64 rows the product is not Triton's.
    Room(mlp.OP, mlp.mlp, mlp.samples, lambda a: a["x"].numel() < 1000 or a["x"].shape[0] > 64),
    # dQ and dK are what is left of dP - delta, and delta is made from the rounded output.
    Room(attention.OP, attention.attention, attention.samples, _few("qkv", 5000), row_slack=0.25),
    Room(attention.DECODE, attention.attention_decode, attention.decode_samples),
    Room(embedding.OP, embedding.embedding, embedding.samples),
    Room(head.OP, head.linear_cross_entropy, head.samples, _few("x", 1000)),
]
DERIVED = [room for room in ROOMS if room.op.gradients]
