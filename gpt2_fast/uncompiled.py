"""Names of torch whose first use imports all of torch.compile, without that: half of a command's start.

Each does here what it does there. tests/test_uncompiled.py compares them, so that another torch shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def assume_constant_result(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result: a compiled graph takes what the function returns as a constant."""
    function._dynamo_marked_constant = True
    return function


class Optimizer(torch.optim.Optimizer):
    """torch.optim.Optimizer, whose methods are decorated to be left out of a compiled graph."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class _NothingDrawn(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is torch.nn.init.normal_ else func(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """`with torch.device("meta")`: modules without memory. There a normal draw goes by what the compiler traces."""
    with torch.device("meta"), _NothingDrawn():
        yield
