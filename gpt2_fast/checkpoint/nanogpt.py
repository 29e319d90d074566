"""nanoGPT's ckpt.pt, as a config and a state dict and back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2_fast.checkpoint.state_dict import (
    ACTIVATIONS,
    EMBEDDING,
    HEAD,
    canonical_state_dict,
    check_expressible,
    check_layers,
    check_plausible,
    expected_shapes,
    token_ids,
    transposed,
)
from gpt2_fast.checkpoint.torch_file import torch_load
from gpt2_fast.config import GPT2Config
from gpt2_fast.files import atomic_write

# nanoGPT's model_args and what they are called here.
_NANOGPT = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
COMPILED = "_orig_mod."  # the prefix of a state dict of a torch.compile'd module


def read_nanogpt(path: str | os.PathLike[str]) -> tuple[GPT2Config, dict[str, Tensor], list[str]]:
    """Config, state dict and notes for the user from a ckpt.pt of nanoGPT's train.py, read as weights only.

    Its activation_function is "gelu", by erf. A model without biases gets zero biases, which compute the same.
    vocab_size stays padded where it was.
    Raises FileNotFoundError or ValueError, one line, for a missing, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a ckpt.pt of nanoGPT")
    data = torch_load(path)
    state, arguments = (data.get("model"), data.get("model_args")) if isinstance(data, Mapping) else (None, None)
    if not isinstance(state, Mapping) or not isinstance(arguments, Mapping):
        raise ValueError(f"{path} is not a nanoGPT checkpoint: it has no 'model' and 'model_args'")
    if not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} is not a nanoGPT checkpoint: its 'model' holds more than tensors by name")
    try:
        config, bias = nanogpt_config(arguments)
        state = {name.removeprefix(COMPILED): tensor for name, tensor in state.items()}
        check_plausible(config, sum(t.numel() for t in state.values()), "the weights hold")  # before zeros are made
        check_layers(state, config)
        if not bias:
            for name, shape in expected_shapes(config).items():
                if name.endswith(".bias"):
                    weight = state.get(f"{name[:-5]}.weight")
                    state.setdefault(
                        name, torch.zeros(shape, dtype=None if weight is None else weight.dtype, device="cpu")
                    )
        state = {name: transposed(name, tensor) if tensor.ndim == 2 else tensor for name, tensor in state.items()}
        state = canonical_state_dict(state, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    notes = [] if bias else ["the model has no biases; zeros stand in for them and compute the same"]
    return config, state, notes


def nanogpt_dataset(path: Path) -> str | None:
    """The name of the data that a ckpt.pt was trained on, a folder below nanoGPT's data/; None where it has none."""
    try:
        data = torch_load(path, mmap=True)
    except ValueError:  # no zip archive, or none of torch's: its own reader says so
        return None
    settings = data.get("config") if isinstance(data, Mapping) else None
    name = settings.get("dataset") if isinstance(settings, Mapping) else None
    # A name with folders in it could point anywhere on the disk.
    return name if isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name else None


def nanogpt_config(arguments: Mapping[str, Any]) -> tuple[GPT2Config, bool]:
    """What nanoGPT's model_args (the fields of its GPTConfig) are here, and whether its layers have biases.

    Raises ValueError, one line, for a size that is missing or does not fit, and for an option that nanoGPT lacks.
    """
    if missing := [name for name in _NANOGPT if name not in arguments]:
        raise ValueError(f"model_args has no {missing[0]}")
    for name, value in arguments.items():
        if name not in (*_NANOGPT, "bias", "dropout") and value:
            raise ValueError(f"model_args has {name} = {value!r}, which GPT-2 does not have")
    sizes = {ours: arguments[theirs] for theirs, ours in _NANOGPT.items()}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), arguments.get("dropout", 0.0))
    config = GPT2Config(
        **sizes, **dropout, **token_ids(sizes["vocab_size"]), activation_function=ACTIVATIONS["nanogpt"]
    )
    return config, bool(arguments.get("bias", True))  # checkpoints older than the option have biases


def nanogpt_arguments(config: GPT2Config) -> dict[str, Any]:
    """nanoGPT's sizes and bias of a config, as its GPTConfig takes them; no dropout."""
    return {theirs: getattr(config, ours) for theirs, ours in _NANOGPT.items()} | {"bias": True}


def nanogpt_state(state_dict: Mapping[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """A GPT2LMHeadModel's state dict as nanoGPT's GPT loads it, on the CPU, the tied head stored once."""
    state = {n: transposed(n, t.detach().cpu()) for n, t in canonical_state_dict(state_dict, config).items()}
    state[HEAD] = state[EMBEDDING]
    return state


def write_nanogpt(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], config: GPT2Config) -> None:
    """Write a ckpt.pt that nanoGPT's sample.py loads; it holds no optimizer, so train.py cannot resume from it.

    Raises ValueError for a model that nanoGPT cannot compute, OSError where the file cannot be written.
    """
    check_expressible(config, "nanoGPT")
    if not config.embd_pdrop == config.attn_pdrop == config.resid_pdrop:
        raise ValueError("nanoGPT has one dropout; make embd_pdrop, attn_pdrop and resid_pdrop equal in config.json")
    state, arguments = nanogpt_state(state_dict, config), nanogpt_arguments(config) | {"dropout": config.resid_pdrop}
    data = {"model": state, "model_args": arguments, "iter_num": 0, "best_val_loss": math.inf, "config": {}}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(data, file)
