"""Which format a checkpoint has, and one door to all of them: `load`."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gpt2_fast.checkpoint.hf import load_pretrained
from gpt2_fast.checkpoint.llmc import LLMC_MAGIC, read_llmc
from gpt2_fast.checkpoint.nanogpt import read_nanogpt
from gpt2_fast.config import GPT2Config

FORMATS = ("hf", "nanogpt", "llmc")
_SUFFIXES = {".pt": "nanogpt", ".pth": "nanogpt", ".bin": "llmc"}
# Files of formats that are not written here; without this list they would become names of folders.
_FOREIGN = (".safetensors", ".gguf", ".onnx", ".ckpt", ".npz", ".json")
# The first bytes of a file: torch.save's zip archive, and llm.c's token shards.
_ZIP, _LLMC_TOKENS = b"PK\x03\x04", (20240520, 20240801)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint of any format. notes: what a user should know, one sentence each."""

    format: str
    config: GPT2Config
    state: dict[str, Tensor]
    notes: tuple[str, ...]


def source_format(source: str | os.PathLike[str]) -> str:
    """One of FORMATS, by what a file begins with, then by its suffix. Anything that is no file is "hf"."""
    path = Path(source).expanduser()
    if not path.is_file():
        if path.suffix in _SUFFIXES and not path.is_dir():
            raise FileNotFoundError(f"{path} does not exist; give a checkpoint")
        return "hf"
    with open(path, "rb") as file:
        start = file.read(4)
    if start == _ZIP:
        return "nanogpt"
    magic = struct.unpack("<i", start)[0] if len(start) == 4 else None
    if magic in _LLMC_TOKENS:
        raise ValueError(f"{path} is a shard of llm.c's tokens, not a checkpoint")
    if magic == LLMC_MAGIC:
        return "llmc"
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    raise ValueError(
        f"{path} is not a checkpoint in a known format; give a Hugging Face folder, a nanoGPT .pt or an llm.c .bin"
    )


def target_format(target: str | os.PathLike[str]) -> str:
    """One of FORMATS by the target's name: .pt or .pth is nanoGPT's, .bin llm.c's, any other name a folder."""
    path = Path(target)
    if path.suffix in _FOREIGN:
        raise ValueError(f"{path} names a {path.suffix} file; give a folder, a .pt or a .bin, or say which with --to")
    return "hf" if path.is_dir() else _SUFFIXES.get(path.suffix, "hf")


def load(source: str | os.PathLike[str]) -> Loaded:
    """Read a Hugging Face folder or hub name, a nanoGPT ckpt.pt or an llm.c .bin; tensors on the CPU, dtypes kept.

    Raises FileNotFoundError or ValueError, one line that names the file and what is wrong with it.
    """
    kind = source_format(source)
    if kind == "hf":
        return Loaded(kind, *load_pretrained(source), ())
    read = read_nanogpt if kind == "nanogpt" else read_llmc
    config, state, notes = read(Path(source).expanduser())
    return Loaded(kind, config, state, tuple(notes))
