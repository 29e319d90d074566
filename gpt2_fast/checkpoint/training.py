"""training.pt: the state from which a training run resumes to the bit, all in one file, whole or not there."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2_fast.checkpoint.torch_file import torch_load
from gpt2_fast.config import GPT2Config
from gpt2_fast.files import atomic_write

TRAINING = "training.pt"

_FORMAT = "gpt2_fast training state 1"
_PLAIN = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class TrainingState:
    """What a run resumes from. model and optimizer go into `load_state_dict`, rng into `restore_rng`."""

    step: int  # optimizer steps done
    config: GPT2Config
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Any]
    extra: dict[str, Any]


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
    """Write folder/training.pt, all in one file so that its parts are of one step. Returns its path.

    Args:
        folder: of the run; made where it is missing.
        step: how many steps are done.
        config: of the model.
        model_state, optimizer_state: state dicts.
        rng: as from `capture_rng`; None captures it now.
        extra: whatever else the loop needs, of tensors, numbers, strings, None, lists, tuples and dicts, as
            everything here: the file loads with no code run.

    Raises:
        TypeError: anything else is in it; the message says where.
        OSError: the folder cannot be written.
    """
    state = {
        "format": _FORMAT,
        "step": step,
        "config": config.to_dict(),
        "model": dict(model_state),
        "optimizer": dict(optimizer_state),
        "rng": dict(capture_rng() if rng is None else rng),
        "extra": dict(extra or {}),
    }
    _check_plain(state, "state")
    target = Path(folder) / TRAINING
    with atomic_write(target) as path, open(path, "wb") as file:
        torch.save(state, file)
    return target


def load_training_state(path: str | os.PathLike[str], *, config: GPT2Config | None = None) -> TrainingState:
    """Read training.pt, or the folder that holds it; tensors come on the CPU. Nothing is restored yet.

    config: of the model that is to go on; ValueError names the first field in which the file's differs.
    Raises FileNotFoundError or ValueError, one line, for a missing, truncated or foreign file.
    """
    path = Path(path).expanduser()
    path = path / TRAINING if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; there is no run to resume")
    state = torch_load(path)
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a training state of this version of gpt2_fast")
    saved = GPT2Config.from_dict(state["config"])
    if config is not None and saved != config:
        name = next(name for name in vars(saved) if getattr(saved, name) != getattr(config, name))
        raise ValueError(
            f"{path} is of another model: {name} is {getattr(saved, name)!r} there and {getattr(config, name)!r} here; "
            "resume with the settings it was started with"
        )
    return TrainingState(state["step"], saved, state["model"], state["optimizer"], state["rng"], state["extra"])


def _check_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise TypeError(f"{where} is a {type(value).__name__}; a training state holds tensors and plain values only")
