"""A run's folder: what it was started with, and where it goes on from."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from gpt2_fast.checkpoint.run_folder import (
    BEST,
    NEWEST,
    checkpoints,
    is_runs_link,
    load_checkpoint,
    mend,
    set_aside,
)
from gpt2_fast.checkpoint.training import EARLIER, TRAINING, TrainingState
from gpt2_fast.train.config import SIZES, TrainConfig
from gpt2_fast.train.options import read_options, write_options
from gpt2_fast.train.say import say

METRICS, OPTIONS, LOCK, PLOT = "metrics.jsonl", "config.yaml", ".lock", "loss.png"
EARLIER_OPTIONS = "run.json"  # what config.yaml was
# What a run is: another value would be another run.
FIXED = ("model", *SIZES, "init_from", "dropout", "out")
ORDERED_BY = ("order", "seed", "context", "batch_size", "grad_accum")


def new_folder(config: TrainConfig) -> Path:
    """Where a new run goes."""
    out = Path(config.out or f"runs/{config.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_new(out)
    return out


def check_new(out: Path) -> None:
    """Raises ValueError, one line, where a folder holds a run, or what a new one would replace."""
    if holds_run(out):
        raise ValueError(f"--out {out} holds a run already; continue it with --resume {out}, or choose another --out")
    for path in (out / name for name in (NEWEST, BEST, PLOT)):
        if os.path.lexists(path) and not is_runs_link(path):
            raise ValueError(f"{path} is there already, and a run would replace it; move it, or choose another --out")


def holds_run(folder: Path) -> bool:
    names = (METRICS, OPTIONS, EARLIER_OPTIONS, EARLIER, TRAINING)
    return any((folder / name).exists() for name in names) or bool(checkpoints(folder))


def record_options(out: Path, config: TrainConfig) -> None:
    """config.yaml: from which a run that was killed before its first checkpoint is started again, and any other."""
    write_options(out / OPTIONS, config)
    (out / EARLIER_OPTIONS).unlink(missing_ok=True)


def recorded_options(out: Path) -> dict[str, Any]:
    """Raises FileNotFoundError or ValueError, one line."""
    path = next((out / name for name in (OPTIONS, EARLIER_OPTIONS) if (out / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{out} holds no checkpoint and no {OPTIONS}; there is no run to resume")
    try:
        options = read_options(path)  # JSON is YAML too
        TrainConfig(**options)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); start the run again with another --out") from None
    return options


def newest_run(folder: Path = Path("runs")) -> Path | None:
    """The run in `folder` that was written to last."""
    runs = [path for path in folder.iterdir() if path.is_dir() and holds_run(path)] if folder.is_dir() else []
    return max(runs, key=lambda path: max(p.stat().st_mtime for p in path.iterdir()), default=None)


def resolve(resume: str, options: dict[str, Any]) -> Path | None:
    """The folder that --resume names. "auto": --out, or the newest in runs/; None where there is no run yet."""
    if resume != "auto":
        return Path(resume).expanduser()
    out = options.get("out")
    if out is None:
        return newest_run()
    return Path(out) if holds_run(Path(out)) else None


def run_of(folder: Path) -> Path:
    """The run's folder of a run's folder or of one of its checkpoints. Raises FileNotFoundError, one line."""
    if not folder.exists():
        raise FileNotFoundError(f"--resume {folder} does not exist; there is no run to resume")
    return folder.resolve().parent if _is_checkpoint(folder) else folder


def _is_checkpoint(folder: Path) -> bool:
    return folder.name.startswith("checkpoint") and (folder / TRAINING).is_file()


def find_state(folder: Path) -> TrainingState | None:
    """What to go on from, of a run's folder or one of its checkpoints.

    None where the run was stopped before its first checkpoint: it starts again from its recorded options.
    """
    if _is_checkpoint(folder):
        return load_checkpoint(folder.resolve())[0]
    if checkpoints(folder) or any((folder / name).is_file() for name in (EARLIER, TRAINING)):
        return load_checkpoint(folder)[0]
    return None


def take_over(out: Path, state: TrainingState | None) -> None:
    """Makes a locked folder one in which `state` is the newest, and nothing is half done."""
    if state is not None and state.path is not None:
        for moved in set_aside(out, state.path.parent):
            say(f"the run goes on from {state.path.parent}; the newer checkpoint is kept as {moved}", "stderr")
    mend(out, None if state is None else state.extra.get("best_step"))


def options_to_resume(saved: dict[str, Any], given: dict[str, Any], out: Path) -> TrainConfig:
    """The options of a run that goes on: what is given takes effect, what would make it another run is refused."""
    for name in FIXED:
        if name in given and given[name] != saved.get(name) and not (name == "out" and Path(given[name]) == out):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} cannot change when a run is resumed; start a new run for that")
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(saved.keys() - known):
        raise ValueError(f"{out} was started with {unknown[0]!r}, an option that this version does not have")
    config = TrainConfig(**{**saved, **given, "out": saved.get("out")})
    moved = any(given.get(name, saved.get(name)) != saved.get(name) for name in ("lr", "min_lr"))
    return config.check_rates() if moved else config


def moved_order(saved: dict[str, Any], config: TrainConfig) -> str | None:
    """What to say where a run that is resumed has left the epoch it was in; None where it goes on in it.

    --order epoch counts windows from the run's first step by the size of a step as it is now. Another cut of a step
    into micro-batches takes the same windows.
    """
    before = TrainConfig(**{name: saved[name] for name in ORDERED_BY if name in saved})
    kind = lambda c: (c.order, c.seed, c.context, c.batch_size * c.grad_accum)
    if "epoch" not in (before.order, config.order) or kind(before) == kind(config):
        return None
    return (
        "the run goes on with another order of its data (--order, --seed, --context, or the sequences of a step): "
        "windows of the epoch that it was in may come twice or not at all"
    )
