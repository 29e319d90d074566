"""One damaged file: made, read, and what came of it."""

from __future__ import annotations

import random
import resource
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .formats import FORMATS, prepare

RIGHT, REFUSED, OTHER, WRONG, UNCLEAR = "right", "refused", "other", "wrong", "unclear"
CLEAR = (ValueError, OSError, TypeError)  # FileNotFoundError is an OSError
MEMORY = 1 << 30  # bytes that reading may take besides


def limit_memory() -> None:
    """What this process has now and MEMORY more: a size in a file must not be believed before it is compared."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def same(a: Any, b: Any) -> bool:
    """Whether two things that were read are equal, tensors and floats to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        # Contiguous, because a view by another dtype needs it; and all of it is touched.
        return a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Judge:
    """Judges files of any format; the sound ones are made once, in a folder of its own."""

    def __init__(self, folder: Path | None = None):
        self._own = tempfile.TemporaryDirectory() if folder is None else None
        self._folder = Path(self._own.name) if self._own else folder
        self._sound: dict[str, tuple[bytes, Any]] = {}

    def __call__(self, name: str, seed: int) -> tuple[str, str]:
        """(kind, text) of the file that is damaged by this seed."""
        format, folder = FORMATS[name], self._folder / str(list(FORMATS).index(name))
        path = folder / format.file
        if name not in self._sound:
            prepare(name, folder)
            self._sound[name] = path.read_bytes(), format.read(folder)
        content, sound = self._sound[name]
        damaged = format.damage(content, random.Random(f"{name} {seed}"))
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = format.read(folder)
                if same(result, sound):
                    return RIGHT, ""
        except Exception as error:
            return refused(error, self._folder)
        if format.checked:
            return WRONG, "changed bits were taken in spite of the checksum"
        return OTHER, ""


def refused(error: Exception, folder: Path) -> tuple[str, str]:
    """Whether an error is one that a user can make sense of: its kind, one line, the file in it."""
    text = str(error)
    kind = type(error).__name__
    if not isinstance(error, CLEAR):
        return UNCLEAR, f"{kind}: {text[:200]}"
    if "\n" in text or str(folder) not in text:
        return UNCLEAR, f"{kind} of {'several lines' if chr(10) in text else 'no file'}: {text[:200]!r}"
    if len(text) > 2000:
        return UNCLEAR, f"{kind} of {len(text):,} characters: {text[:200]!r}"
    return REFUSED, text
