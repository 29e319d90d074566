"""Memory of activations and gradients on a CPU, kept from step to step in a process that called `retain_memory`.

malloc alone wastes up to a third of a training step's memory: small objects settle between large blocks and keep their
holes apart, and glibc before 2.38 cannot fill a hole with an aligned block of that very size (it asks for 96 bytes
more). Here large blocks have a region of addresses of their own. A block goes to the smallest hole that takes it, at
the lowest address; when its last tensor is gone it joins the holes beside it. Nothing is given back to the system.
"""

from __future__ import annotations

import bisect
import collections
import ctypes
import functools
import math
import os
import threading
import weakref

import torch
from torch import Tensor

from gpt2_fast.ops.runtime import memory

SMALLEST = 1 << 20  # bytes; malloc has what is smaller
PAGE = 4096


class Region:
    """`size` bytes of addresses, which become memory page by page when they are first written.

    Raises OSError where the system has not that many addresses.
    """

    def __init__(self, size: int):
        self._memory = memory.large_pages(size)
        self.holes = [(0, size)]  # (start, end), by address, no two of them adjacent
        self._returned: collections.deque[tuple[int, int]] = collections.deque()
        self._live: dict[int, weakref.ref] = {}
        self.lock = threading.RLock()  # a signal handler that forks may interrupt the thread that holds it
        self._busy = False

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """An uninitialised contiguous tensor of at least one element; None where no hole takes it."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self.lock:
            if self._busy:  # a signal handler or a finaliser within `collect` or `_carve` of this thread
                return None
            try:
                self._busy = True
                self.collect()
                span = self._carve(memory.round_up(nbytes, PAGE))
            finally:
                self._busy = False
        if span is None:
            return None
        # The storage holds the array, which dies with it. That is noted without the lock: this thread may hold it.
        array = (ctypes.c_char * nbytes).from_buffer(self._memory, span[0])
        self._live[span[0]] = weakref.ref(array, lambda _: self._returned.append(span))
        storage = torch.frombuffer(array, dtype=dtype).untyped_storage()
        with torch.inference_mode(False):  # what is saved for backward must be an ordinary tensor
            # Not a view, which autograd would forbid to be changed in place.
            return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape)

    def _carve(self, nbytes: int) -> tuple[int, int] | None:
        fitting = [(end - start, start, i) for i, (start, end) in enumerate(self.holes) if end - start >= nbytes]
        if not fitting:
            return None
        size, start, i = min(fitting)
        self.holes[i : i + 1] = [(start + nbytes, start + size)] if size > nbytes else []
        return start, start + nbytes

    def collect(self) -> None:
        """Makes holes of the blocks whose tensors are gone."""
        while self._returned:
            start, end = self._returned.popleft()
            del self._live[start]
            i = bisect.bisect(self.holes, (start, end))
            if i < len(self.holes) and self.holes[i][0] == end:
                end = self.holes.pop(i)[1]
            if i > 0 and self.holes[i - 1][1] == start:
                i, start = i - 1, self.holes.pop(i - 1)[0]
            self.holes.insert(i, (start, end))


@functools.cache
def _region() -> Region | None:
    """As many addresses as the machine has memory; None where they are not to be had, and malloc has it all."""
    try:
        return Region(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except OSError:
        return None


def _forking() -> None:
    """A fork waits for the thread that takes a block: its child has the region whole, and the lock free."""
    if _region.cache_info().currsize and (region := _region()) is not None:
        region.lock.acquire()


def _forked(child: bool) -> None:
    if _region.cache_info().currsize and (region := _region()) is not None:
        try:
            region.lock.release()
        except RuntimeError:  # another thread made the region since `_forking`, and may be in the middle of it
            if child:
                _region.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_forking,
        after_in_parent=functools.partial(_forked, child=False),
        after_in_child=functools.partial(_forked, child=True),
    )


def takes(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the region is where a CPU tensor like this goes."""
    return memory.retained and math.prod(shape) * dtype.itemsize >= SMALLEST


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised and contiguous, on the device of `like`."""
    region = _region() if takes(shape, dtype) and like.is_cpu else None
    taken = None if region is None else region.take(shape, dtype)
    if taken is None:
        return torch.empty(shape, dtype=dtype, device=like.device)  # in half of new_empty's time
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
        taken.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)  # as torch.empty does then
    return taken
