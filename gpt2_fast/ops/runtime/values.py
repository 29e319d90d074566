"""What a backend reads and what it writes, by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2_fast.ops.runtime import buffers

# What is allocated: shape and dtype, and of a matrix whether its transpose is what is contiguous; or nothing.
Spec = tuple[Sequence[int], torch.dtype] | tuple[Sequence[int], torch.dtype, bool] | None


class Arguments:
    """What a backend reads, by name."""

    def __init__(self, values: dict[str, Any]):
        self.__dict__ = values

    def named(self) -> dict[str, Any]:
        """All of it, for a kernel that takes its arguments by name."""
        return self.__dict__


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype, transposed: bool = False) -> Tensor:
    return buffers.empty(like, tuple(shape[::-1]), dtype).t() if transposed else buffers.empty(like, shape, dtype)


def maker(like: Tensor, spec: Spec) -> Callable[[], Tensor] | None:
    """What allocates `spec` on the device of `like`, for many calls: where it is small, in half of new_empty's time."""
    if spec is None:
        return None
    shape, dtype, *transposed = spec
    if any(transposed) or math.prod(shape) * dtype.itemsize >= buffers.SMALLEST:
        return functools.partial(_empty, like.new_empty(0), *spec)  # keeps no memory of this call
    strides = torch.empty(shape, device="meta").stride()
    return functools.partial(torch.empty_strided, tuple(shape), strides, dtype=dtype, device=like.device)


class Outputs:
    """What a backend writes, by name: made by `makers`, of the declaration's specs, when it is first read."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor] | None]):
        self._makers = makers

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("_") or name not in self._makers:
            raise AttributeError(f"no output {name!r} is declared")
        make = self._makers[name]
        made = self.__dict__[name] = None if make is None else make()
        return made

    def named(self) -> dict[str, Any]:
        """Everything declared, for a kernel that takes its arguments by name."""
        own = self.__dict__
        for name, make in self._makers.items():
            if name not in own:
                own[name] = None if make is None else make()
        return own


def outputs(like: Tensor, specs: Mapping[str, Spec]) -> Outputs:
    """What a single call writes."""
    return Outputs({n: None if spec is None else functools.partial(_empty, like, *spec) for n, spec in specs.items()})


def described(like: Tensor, spec: Spec) -> Tensor:
    """What a fake returns for `spec`."""
    if spec is None:
        return like.new_empty(0)
    shape, dtype, transposed = (*spec, False)[:3]
    return like.new_empty(shape[::-1], dtype=dtype).t() if transposed else like.new_empty(shape, dtype=dtype)
