"""The checkpoints in a run's folder, each of one step, whole or not there.

    checkpoint-000500/     config.json, model.safetensors, the tokenizer's files: a Hugging Face folder,
                           and training.safetensors: optimizer, random states, options, SHA-256 of the other files
    checkpoint             a link to the newest
    checkpoint-best        a link to the one with the best validation loss

A checkpoint is made under a temporary name, brought to the disk, and renamed. A resumed run takes the newest.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2_fast.checkpoint.hf import load_pretrained, save_pretrained
from gpt2_fast.checkpoint.sealed import sha256_of
from gpt2_fast.checkpoint.training import (
    EARLIER,
    TRAINING,
    TrainingState,
    load_training_state,
    save_training_state,
)
from gpt2_fast.config import GPT2Config
from gpt2_fast.files import atomic_folder, remove_temporary, sync_folder, temporary_name

NEWEST, BEST = "checkpoint", "checkpoint-best"
_NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?")
# What `checkpoint` holds where it is a folder: an earlier version's, or a copy that followed the link.
_FILES = {
    "config.json", "generation_config.json", "model.safetensors", TRAINING, "vocab.json", "merges.txt",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
}  # fmt: skip


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = []
    for path in folder.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and not path.is_symlink() and (path / TRAINING).is_file():
            found.append((int(match[1]), int(match[2] or 1), path))
    return [path for *_, path in sorted(found)]


def is_links_place(path: Path) -> bool:
    """Whether a link may take the place of `path`: it is free, a link, or a checkpoint's folder and nothing else."""
    if path.is_symlink() or not path.exists():
        return True
    if not path.is_dir():
        return False
    names = {file.name for file in path.iterdir()}
    mark = TRAINING in names or (path.parent / EARLIER).is_file()  # an earlier version had its state beside it
    return mark and {"config.json", "model.safetensors"} <= names <= _FILES


def is_runs_link(path: Path) -> bool:
    """Whether `path` is a link to a checkpoint beside it, as a run makes them, or to one that is gone."""
    return path.is_symlink() and _NAME.fullmatch(os.readlink(path)) is not None


def save_checkpoint(
    folder: str | os.PathLike[str],
    *,
    step: int,
    config: GPT2Config,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
    rng: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    keep: int = 2,
    best: bool = False,
) -> Path:
    """Write the checkpoint of one step and point `checkpoint` to it. Returns its path.

    Args: those of `save_training_state`, and
        tokenizer: its `save_pretrained(folder)` writes its files; None for none.
        keep: so many of the newest stay, and the best.
        best: point `checkpoint-best` to it.

    Raises OSError, one line, where it cannot be written; what was there before is there still. So it does when the
    checkpoint is written and a file or folder that is no checkpoint has the name of a link.
    """
    folder = Path(folder)
    remove_temporary(folder)
    with atomic_folder(_free_name(folder, step)) as path:
        save_pretrained(path, model_state, config)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        files = {file.name: sha256_of(file) for file in sorted(path.iterdir())}
        extra = {**(extra or {}), "files": files}
        options = {"step": step, "config": config, "rng": rng, "extra": extra}
        save_training_state(path, model_state={}, optimizer_state=optimizer_state, **options)
    path = checkpoints(folder)[-1]
    _point(folder / NEWEST, path)
    if best:
        _point(folder / BEST, path)
    (folder / EARLIER).unlink(missing_ok=True)  # what this checkpoint goes on from, or went on from long ago
    _prune(folder, keep)
    return path


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[TrainingState, Path]:
    """(the state, where it was) of a checkpoint, or of the newest in a run's folder; an earlier training.pt too.

    Raises FileNotFoundError or ValueError, one line that names the damaged file and the checkpoint before it.
    """
    folder = Path(path).expanduser()
    found = checkpoints(folder)
    if not found:
        if not (folder / TRAINING).is_file():
            return load_training_state(folder), folder
        return _load(folder), folder
    try:
        return _load(found[-1]), found[-1]
    except (ValueError, FileNotFoundError) as error:
        before = f"go on from the one before: --resume {found[-2]}" if found[1:] else "it is the only checkpoint"
        raise ValueError(f"{error}; {before}") from None


def _load(path: Path) -> TrainingState:
    state = load_training_state(path)
    files = state.extra.get("files")
    if files is None:  # written by save_training_state alone
        return state
    for name, digest in files.items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing")
        if sha256_of(path / name) != digest:
            raise ValueError(f"{path / name} is damaged: its SHA-256 is not the one that it was saved with")
    config, model = load_pretrained(path)
    if config != state.config:
        raise ValueError(f"{path} is damaged: config.json is not of the model in {TRAINING}")
    return dataclasses.replace(state, model=model)


def mend(folder: Path, best_step: int | None = None) -> None:
    """Finishes what a writer that was killed had begun: its temporary files go, and the links fit the checkpoints.

    best_step: of the best checkpoint, as far as the newest knows; a later one may have been set aside.
    """
    remove_temporary(folder)
    found = checkpoints(folder)
    if found and (folder / NEWEST).resolve() != found[-1].resolve():
        _point(folder / NEWEST, found[-1])
    for link in (folder / NEWEST, folder / BEST):
        if link.is_symlink() and not link.exists():  # to a checkpoint that was set aside
            link.unlink()
    of_best = [path for path in found if best_step is not None and _step(path) == best_step]
    if of_best and (folder / BEST).resolve() != of_best[-1].resolve():
        _point(folder / BEST, of_best[-1])


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def set_aside(folder: Path, newest: Path) -> list[Path]:
    """Renames the checkpoints that are newer than the one a run goes on from: nothing is lost, none is taken."""
    found = checkpoints(folder)
    moved = []
    for path in found[found.index(newest) + 1 :] if newest in found else []:
        target = path.with_name(f"replaced-{path.name}")
        for i in range(2, 1000):
            if not target.exists():
                break
            target = path.with_name(f"replaced-{path.name}.{i}")
        os.rename(path, target)
        moved.append(target)
    return moved


def _free_name(folder: Path, step: int) -> Path:
    """A run that is stopped, resumed and stopped again at one step has two checkpoints of it: none is replaced."""
    path, i = folder / f"checkpoint-{step:06d}", 1
    while path.exists():
        i += 1
        path = folder / f"checkpoint-{step:06d}-{i}"
    return path


def _point(link: Path, target: Path) -> None:
    """Makes `link` point to `target`, in one move; on a system without links it is left out.

    Raises OSError, one line, where something of that name is no checkpoint.
    """
    if not is_links_place(link):
        raise OSError(f"{link} is not this run's and stays as it is; move it away ({target} is saved)")
    temporary = temporary_name(link)
    with suppress(OSError, NotImplementedError):
        os.symlink(target.name, temporary, target_is_directory=True)
        if link.is_dir() and not link.is_symlink():  # an ordinary folder
            old = temporary_name(link)
            os.rename(link, old)
            os.replace(temporary, link)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, link)
        sync_folder(link.parent)


def _prune(folder: Path, keep: int) -> None:
    best = (folder / BEST).resolve() if (folder / BEST).is_symlink() else None
    for path in checkpoints(folder)[: -max(keep, 1)]:
        if best is None or path.resolve() != best:
            going = temporary_name(path)  # half of a checkpoint is never found under its own name
            os.rename(path, going)
            shutil.rmtree(going, ignore_errors=True)
