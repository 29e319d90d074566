"""Where large tensors lie on a CPU: pages of 2 MiB, and how the C library hands out memory in a training process."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys

# Parameters of mallopt, from <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3

retained = False  # whether `retain_memory` was called, and took effect


def round_up(n: int, step: int) -> int:
    """The least multiple of `step` that is not below n."""
    return -(-n // step) * step


def large_pages(size: int) -> mmap.mmap:
    """`size` bytes of zeros, which become memory when first written, on pages of 2 MiB where the system has them.

    Raises OSError where the system has not that many addresses.
    """
    # Private, since shared memory gets no such pages.
    wanted = ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_NORESERVE")
    flags = sum(getattr(mmap, name, 0) for name in wanted)
    memory = mmap.mmap(-1, size, **({"flags": flags} if flags else {}))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: ordinary pages hold the same numbers
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def retain_memory() -> bool:
    """Lets this process keep the memory that tensors on the CPU free, for the tensors that come next.

    By default glibc gives every block above 32 MiB, and the top of its heap, back to the system at each free: a
    training step then takes page faults for all of its activations and gradients anew, which costs more than some
    of its arithmetic. `gpt2-fast train` calls this; call it once, before training, in a loop of your own. Activations
    and gradients then lie in a region of their own (`ops/runtime/buffers.py`), so that the process holds little more
    at its peak than its tensors, which malloc alone does not manage; between peaks it holds the same.

    Returns False, and changes nothing, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}
    global retained
    retained = all(libc.mallopt(parameter, value) == 1 for parameter, value in settings.items())
    return retained
