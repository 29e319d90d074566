"""Safetensors files that know their own SHA-256: a file is read only if no bit of it has changed.

The digest stands in the file's metadata. It is that of the whole file with zeros in the digest's own place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
from torch import Tensor

from gpt2_fast.checkpoint.hf import write_safetensors
from gpt2_fast.checkpoint.torch_file import first_line

DIGEST = "sha256"
_BLANK = "0" * 64
_LARGEST_HEADER = 100_000_000  # bytes: safetensors' own limit


def sha256_of(path: Path, head: bytes = b"", skip: int = 0) -> str:
    """SHA-256, hexadecimal, of `head` and of the file from byte `skip` on."""
    sha = hashlib.sha256(head)
    with open(path, "rb", buffering=0) as file:
        file.seek(skip)
        block = memoryview(bytearray(1 << 20))
        while count := file.readinto(block):
            sha.update(block[:count])
    return sha.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes `tensors` and `metadata` with their digest. Tensors must not share memory."""
    write_safetensors(path, tensors, {**metadata, DIGEST: _BLANK})
    head = _head(path)
    at = head.index(_place(_BLANK)) + len(_place("")) - 1
    digest = sha256_of(path, head, len(head))
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata. Raises ValueError, one line, unless every bit is as it was written."""
    try:
        head = _head(path)
        digest = json.loads(head[8:])["__metadata__"][DIGEST]
        blank = head.replace(_place(digest), _place(_BLANK))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is not a whole training state; it may be truncated") from None
    if sha256_of(path, blank, len(head)) != digest:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that it was saved with")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - no mapping
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({first_line(error)})") from None


def _place(digest: str) -> bytes:
    return f'"{DIGEST}":"{digest}"'.encode()


def _head(path: Path) -> bytes:
    """The length and the header: all before the tensors."""
    with open(path, "rb") as file:
        length = file.read(8)
        size = int.from_bytes(length, "little")
        if len(length) < 8 or size > _LARGEST_HEADER:
            raise ValueError("no safetensors file")
        return length + file.read(size)
