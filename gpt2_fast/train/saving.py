"""Saving beside the steps: a step waits only for the copy of the state to host memory."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gpt2_fast.report.available import available_bytes


def host_copy(value: Any) -> Any:
    """`value` with every tensor copied to memory of its own on the CPU; one that occurs twice is copied once."""
    copies: dict[int, Tensor] = {}

    def copy(item: Any) -> Any:
        if isinstance(item, Tensor):
            if id(item) not in copies:
                copies[id(item)] = item.detach().to("cpu", copy=True)
            return copies[id(item)]
        if isinstance(item, dict):
            return {key: copy(part) for key, part in item.items()}
        if isinstance(item, (list, tuple)):
            return type(item)(map(copy, item))
        return item

    return copy(value)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in `value`."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(tensor_bytes, parts))


class Saver:
    """Runs one save at a time in a thread of its own; the next one waits for it.

    Args:
        write: (**state) writes a checkpoint; state is a copy that nobody else changes.

    Attributes:
        last: when the last save began, by time.monotonic.
    """

    def __init__(self, write: Callable[..., Any]):
        self._write = write
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.last = time.monotonic()

    def save(self, state: dict[str, Any], beside: bool = True, own: tuple[str, ...] = ()) -> None:
        """Saves `state`, after the save before it. beside: return when it is copied; where memory is short,
        when it is written, as without. An error is raised here, or kept for `take_error`.

        own: keys of it that nobody else changes, and that so need no copy.
        """
        self.settle()
        self.last = time.monotonic()
        copied = {key: value for key, value in state.items() if key not in own}
        # The copy, and what the writer holds of it.
        room, needed = available_bytes(), tensor_bytes(copied) + tensor_bytes(state)
        if not beside or (room is not None and room < needed):
            self._write(**state)
            return
        state = {**state, **host_copy(copied)}
        self._thread = threading.Thread(target=self._run, args=(state,), name="gpt2_fast save")
        self._thread.start()

    def _run(self, state: dict[str, Any]) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own: the step goes first
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            self._write(**state)
        except Exception as error:
            self._error = error

    def settle(self) -> None:
        """Waits for the save that is at work, whatever becomes of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_error(self) -> Exception | None:
        """What ended a save beside the steps, once."""
        error, self._error = self._error, None
        return error

    def wait(self) -> None:
        """Waits for the save that is at work. Raises what ended it."""
        self.settle()
        if (error := self.take_error()) is not None:
            raise error
