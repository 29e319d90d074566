"""Conversion between Hugging Face folders, nanoGPT's ckpt.pt and llm.c's .bin checkpoints.

Lossless: the numbers keep their bits, unless a narrower dtype is asked for by name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from gpt2_fast.checkpoint.formats import FORMATS, Loaded, load, source_format, target_format
from gpt2_fast.checkpoint.hf import save_pretrained
from gpt2_fast.checkpoint.llmc import write_llmc
from gpt2_fast.checkpoint.nanogpt import write_nanogpt
from gpt2_fast.checkpoint.state_dict import ACTIVATIONS
from gpt2_fast.checkpoint.training import TRAINING
from gpt2_fast.config import num_params

__all__ = ["DTYPES", "FORMATS", "Loaded", "convert", "load", "source_format", "summary", "target_format"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Read `source` in whatever format it is, write `target`, and return what was written.

    Nothing is left behind after an error.

    Args:
        source: see `load`.
        target: a file or a folder.
        to: one of FORMATS; None goes by the target's name.
        dtype: of the written weights, torch.float32 or torch.bfloat16. None keeps every number as it is; llm.c then
            gets bfloat16 where all weights are bfloat16, and float32 for narrower or mixed ones, which is exact.

    Raises:
        FileNotFoundError, ValueError, OSError: one line.
    """
    target = Path(target).expanduser()
    to = target_format(target) if to is None else to
    if to not in FORMATS:
        raise ValueError(f"to is {to!r}; choose one of {', '.join(FORMATS)}")
    if dtype not in (None, *DTYPES.values()):
        raise ValueError(f"dtype is {dtype}; choose float32 or bfloat16")
    if to != "hf" and target.is_dir():
        raise ValueError(f"{target} is a folder; a {to} checkpoint is one file")
    if to == "hf" and target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a Hugging Face checkpoint is a folder")
    if to == "hf" and (target / TRAINING).exists():
        raise ValueError(f"{target} is a checkpoint of a run, which could not go on from it; choose another target")
    loaded = load(source)
    stored = _dtype(loaded.state)
    notes = list(loaded.notes)
    if _narrows(stored, dtype):
        notes.append(f"the weights are {str(stored)[6:]} in {source}; they were rounded to {str(dtype)[6:]}")
    config = loaded.config
    if to in ACTIVATIONS:
        notes += _activation_note(config.activation_function, to)
        config = dataclasses.replace(config, activation_function=ACTIVATIONS[to])
    if to == "llmc":
        if dtype is None and stored == torch.float64:
            raise ValueError(f"{source} holds float64, which llm.c cannot store; --dtype float32 rounds it")
        dtype = dtype or (stored if stored in DTYPES.values() else torch.float32)
        notes.append("llm.c keeps neither dropout nor token ids of the config")
    state = loaded.state if dtype is None else _cast(loaded.state, dtype)
    if to == "hf":
        save_pretrained(target, state, config)
    elif to == "nanogpt":
        write_nanogpt(target, state, config)
    else:
        write_llmc(target, state, config, dtype=dtype)
    return Loaded(to, config, state, tuple(notes))


def _activation_note(trained_with: str, to: str) -> list[str]:
    """What to say of a model whose GELU is not the one that `to` computes."""
    by_erf = ACTIVATIONS[to] == "gelu"
    if (trained_with == "gelu") == by_erf:
        return []
    program, own = ("nanoGPT", "erf") if by_erf else ("llm.c", "tanh")
    return [
        f"{program} computes GELU by {own} and this model by {'tanh' if by_erf else 'erf'}: "
        "same weights, outputs differ slightly"
    ]


def summary(written: Loaded, target: str | os.PathLike[str]) -> str:
    """What `convert` did, in lines to print."""
    c = written.config
    head = (
        f"{target}: {written.format}, {str(_dtype(written.state))[6:]}, {num_params(c):,} parameters "
        f"({c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, {c.vocab_size} tokens, {c.n_positions} positions)"
    )
    return "\n".join([head, *(f"note: {note}" for note in written.notes)])


def _dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The narrowest dtype that holds every tensor exactly."""
    return reduce(torch.promote_types, {t.dtype for t in state.values()})


def _narrows(stored: torch.dtype, dtype: torch.dtype | None) -> bool:
    """Whether a cast from stored to dtype can round."""
    return dtype is not None and torch.promote_types(stored, dtype) != dtype


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    cast = {id(t): t.to(dtype) for t in state.values()}  # a tied head stays one tensor
    return {name: cast[id(t)] for name, t in state.items()}
