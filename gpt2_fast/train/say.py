"""Printing that never ends a run: the reader of a pipe, a terminal and the room of a disk may all be gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def say(text: object, to: str = "stdout") -> None:
    """Prints a line to "stdout" or "stderr", where that can be written."""
    stream = getattr(sys, to)
    if stream is None:  # of a closed descriptor
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = str(text).encode(encoding, "backslashreplace").decode(encoding)
    attempt(lambda: print(line, file=stream, flush=True))


def attempt(write: Callable[[], Any]) -> bool:
    """Whether `write` could write. ValueError is what a closed file raises."""
    try:
        write()
    except (OSError, ValueError):
        return False
    return True


class Unfailing:
    """A stream whose writes never raise: tqdm would keep its lock, and wait for it when the process ends."""

    def __init__(self, stream: Any):
        self._wrapped = stream

    def write(self, text: str) -> int:
        attempt(lambda: self._wrapped.write(text))
        return len(text)

    def flush(self) -> None:
        attempt(self._wrapped.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def __eq__(self, other: object) -> bool:
        return self._wrapped == getattr(other, "_wrapped", other)

    __hash__ = object.__hash__


def let_go() -> None:
    """Call at the end of a run: what a stream still holds and cannot write goes nowhere, or the interpreter's end
    would complain."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not attempt(stream.flush):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
