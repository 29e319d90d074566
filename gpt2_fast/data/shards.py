"""nanoGPT's and llm.c's .bin shards: uint16 token ids, memory-mapped.

A .bin file holds the ids alone (nanoGPT), or after llm.c's header of 256 int32: magic 20240520, version 1, count.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_fast.files import atomic_write

MAGIC = 20240520
HEADER_BYTES = 1024
# What else is called .bin, by its first four bytes. None of them can begin a file of GPT-2 ids but the zip.
FOREIGN = {
    20240326: "an llm.c model checkpoint",
    20240801: "llm.c tokens of another vocabulary (32 bits each)",
    20240328: "an llm.c tokenizer",
    int.from_bytes(b"PK\x03\x04", "little"): "a zip archive, such as a PyTorch checkpoint",
}


LOOKED_AT = 1 << 16  # 16-bit words of a bare .bin, for numbers of more bits


class Shard(NamedTuple):
    """A token file's path and uint16 ids mapped from it.

    source: the user's file, where path is a cache's. opened: `_identity` of the file that is mapped.
    """

    path: Path
    tokens: np.ndarray
    source: Path | None = None
    opened: tuple[int, ...] | None = None

    def check_unchanged(self) -> None:
        """Raises ValueError where the mapped file was written: its numbers are others, or, cut short, kill who reads.

        Another file that took its name changes nothing: the one that is mapped stays until it is closed.
        """
        try:
            now = _identity(self.path)
        except OSError:
            return
        if self.opened is not None and now != self.opened and now[:2] == self.opened[:2]:
            raise ValueError(
                f"{self.source or self.path} has changed while it was read; put back what it held, and write new "
                "data under another name"
            )


def _identity(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def write_bin(path: str | os.PathLike[str], parts: Iterable[np.ndarray]) -> int:
    """Write token ids (uint16 arrays) as one llm.c .bin shard, atomically. Returns how many."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    advice = "set GPT2_FAST_CACHE to a folder you can write"
    with atomic_write(path, advice) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        count = 0
        for part in parts:
            file.write(part.astype("<u2", copy=False).tobytes())
            count += len(part)
        # llm.c's count is an int32; where it cannot hold it, the file's size says it.
        header[:3] = MAGIC, 1, min(count, 2**31 - 1)
        file.seek(0)
        file.write(header.tobytes())
    return count


def is_bin(path: Path) -> bool:
    return path.suffix.lower() == ".bin"


def _is_wide(words: np.ndarray) -> bool:
    """Whether 16-bit words are those of 32- or 64-bit ids: every other one is that of their upper bits.

    Hundreds of ids below 4 in every other place, and others between them, are no text of any tokenizer.
    """
    halves = words[0::2], words[1::2]
    return len(halves[1]) >= 256 and any(a.max() < 4 <= b.max() for a, b in (halves, halves[::-1]))


def read_bin(path: str | os.PathLike[str]) -> Shard:
    """Map a nanoGPT or llm.c .bin file. Raises ValueError, one line, where it is not whole or not token data."""
    path = Path(path)
    opened = _identity(path)
    size = opened[2]
    if size == 0:
        raise ValueError(f"{path} is empty")
    if size % 2:
        raise ValueError(f"{path} has {size:,} bytes, an odd number; 16-bit tokens need an even one")
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    header = np.frombuffer(header[: len(header) // 4 * 4], dtype="<i4")
    magic = int(header[0]) if len(header) else 0
    if magic in FOREIGN:
        raise ValueError(f"{path} is {FOREIGN[magic]}, not token data")
    if magic != MAGIC:
        tokens = np.memmap(path, dtype="<u2", mode="r")
        if _is_wide(tokens[:LOOKED_AT]):
            raise ValueError(
                f"{path} holds numbers of 32 or 64 bits and is read as 16-bit tokens; write the ids as uint16, "
                "in numpy ids.astype('uint16').tofile(...)"
            )
        return Shard(path, tokens, opened=opened)
    if len(header) < HEADER_BYTES // 4:
        raise ValueError(f"{path} has {size:,} bytes; llm.c's header alone has {HEADER_BYTES:,}: it is truncated")
    version, count, held = int(header[1]), int(header[2]), (size - HEADER_BYTES) // 2
    if version != 1:
        raise ValueError(f"{path} is an llm.c shard of version {version}; GPT-2's tokens have version 1")
    if count != min(held, 2**31 - 1):
        raise ValueError(f"{path} holds {held:,} tokens where its header says {count:,}; it is truncated")
    if count == 0:
        raise ValueError(f"{path} is empty: its header says 0 tokens")
    return Shard(path, np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES), opened=opened)
