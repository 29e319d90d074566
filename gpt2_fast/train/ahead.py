"""Batches made ahead of the steps that take them, by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Ahead:
    """`make(i)` for i = first, first + 1, ... last - 1, made by a thread up to `depth` before they are taken.

    An error of `make` is raised where its item would have been taken. `close` ends the thread.
    """

    def __init__(self, make: Callable[[int], Any], first: int, last: int, depth: int = 2):
        self._items: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._last, self._at = last, first
        self._thread = threading.Thread(target=self._run, args=(make, first), daemon=True, name="gpt2_fast batches")
        self._thread.start()

    def _run(self, make: Callable[[int], Any], first: int) -> None:
        for i in range(first, self._last):
            try:
                item = (make(i), None)
            except BaseException as error:
                item = (None, error)
            while not self._closed.is_set():
                try:
                    self._items.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or item[1] is not None:
                return

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._at >= self._last:
            raise StopIteration
        item, error = self._items.get()
        if error is not None:
            raise error
        self._at += 1
        return item

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
