"""The state from which a training run resumes to the bit: one file, whole or not there, that knows its own SHA-256.

training.safetensors has every tensor of the state, and in its metadata the rest as JSON. Nothing in it is code.
A training.pt of an earlier version, which had no digest, is still read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2_fast.checkpoint import plain, sealed
from gpt2_fast.checkpoint.torch_file import torch_load
from gpt2_fast.config import GPT2Config
from gpt2_fast.files import atomic_write

TRAINING, EARLIER = "training.safetensors", "training.pt"

_FORMAT = "gpt2_fast training state 2"
_EARLIER_FORMAT = "gpt2_fast training state 1"
_PARTS = ("model", "optimizer", "rng", "extra")


@dataclass(frozen=True)
class TrainingState:
    """What a run resumes from. model and optimizer go into `load_state_dict`, rng into `restore_rng`."""

    step: int  # optimizer steps done
    config: GPT2Config
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Any]
    extra: dict[str, Any]
    path: Path | None = None  # of the file that it was read from


def capture_rng() -> dict[str, Any]:
    """The state of torch's random generators, of the CPU and of every CUDA device in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_rng(rng: Mapping[str, Any]) -> None:
    """Put back what `capture_rng` gave; states of CUDA devices that are not here are passed over."""
    torch.set_rng_state(rng["cpu"])
    for device, state in enumerate(rng["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def save_training_state(
    folder: str | os.PathLike[str],
    *,
    step: int,
    config: GPT2Config,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
    rng: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write folder/training.safetensors, all in one file so that its parts are of one step. Returns its path.

    Args:
        folder: of the run; made where it is missing.
        step: how many steps are done.
        config: of the model.
        model_state, optimizer_state: state dicts.
        rng: as from `capture_rng`; None captures it now.
        extra: whatever else the loop needs, of tensors, numbers, strings, None, lists, tuples and dicts, as
            everything here: the file loads with no code run.

    Raises:
        TypeError: anything else is in it, or a DTensor; the message says where.
        OSError: the folder cannot be written.
    """
    state = {
        "model": dict(model_state),
        "optimizer": dict(optimizer_state),
        "rng": dict(capture_rng() if rng is None else rng),
        "extra": dict(extra or {}),
    }
    tensors: dict[str, Tensor] = {}
    packed = {part: plain.pack(state[part], part, tensors) for part in _PARTS}
    tensors, same = plain.of_their_own(tensors)
    record = {"step": step, "config": config.to_dict(), "same": same, **packed}
    target = Path(folder) / TRAINING
    with atomic_write(target) as path:
        sealed.write(path, tensors, {"format": _FORMAT, "state": json.dumps(record)})
    return target


def load_training_state(path: str | os.PathLike[str], *, config: GPT2Config | None = None) -> TrainingState:
    """Read training.safetensors, or the folder that holds it; tensors come on the CPU. Nothing is restored yet.

    config: of the model that is to go on; ValueError names the first field in which the file's differs.
    Raises FileNotFoundError or ValueError, one line, for a missing, changed, truncated or foreign file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in (TRAINING, EARLIER) if (path / name).is_file()]
        path = found[0] if found else path / TRAINING
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; there is no run to resume")
    state = _read_earlier(path) if path.suffix == ".pt" else _read(path)
    if config is not None and state.config != config:
        saved = state.config
        name = next(name for name in vars(saved) if getattr(saved, name) != getattr(config, name))
        raise ValueError(
            f"{path} is of another model: {name} is {getattr(saved, name)!r} there and {getattr(config, name)!r} here; "
            "resume with the settings it was started with"
        )
    return state


def _read(path: Path) -> TrainingState:
    tensors, metadata = sealed.read(path)
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a training state of this version of gpt2_fast")
    record = json.loads(metadata["state"])
    tensors |= {name: tensors[kept] for name, kept in record["same"].items()}
    parts = {part: plain.unpack(record[part], tensors) for part in _PARTS}
    return TrainingState(record["step"], GPT2Config.from_dict(record["config"]), **parts, path=path)


def _read_earlier(path: Path) -> TrainingState:
    """training.pt has no digest, so what it holds is looked at: a mapping of the known parts and types."""
    state = torch_load(path)
    if not isinstance(state, dict) or state.get("format") != _EARLIER_FORMAT:
        raise ValueError(f"{path} is not a training state of this version of gpt2_fast")
    kinds = {"step": int, "config": dict, **dict.fromkeys(_PARTS, dict)}
    for part, kind in kinds.items():
        if not isinstance(state.get(part), kind):
            raise ValueError(f"{path} is damaged: its {part!r} is not a {kind.__name__}")
    try:
        config = GPT2Config.from_dict(state["config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return TrainingState(state["step"], config, *(state[part] for part in _PARTS), path)
