"""How a run begins: anew, or from what a folder holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gpt2_fast import checkpoint
from gpt2_fast.config import GPT2Config
from gpt2_fast.parallel.group import check_world, join
from gpt2_fast.train import folder as folders
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.loop import Run
from gpt2_fast.train.place import Place
from gpt2_fast.train.say import say


def start_run(options: dict) -> Run:
    """A new run with these options (the fields of TrainConfig)."""
    return Run(TrainConfig(**options).check_rates())


def resume_run(folder: str, options: dict) -> Run:
    """Continues the run in `folder` with the options it had, except those given again.

    folder: of a run, or one of its checkpoints; "auto": see `folder.resolve`. With several processes, the first one
        looks for it, and reads it.
    """
    group = join(TrainConfig(**options).timeout_minutes)
    lock, state = None, None

    def find() -> dict[str, Any] | None:
        nonlocal lock, state
        path = folders.resolve(folder, options)
        if path is None:
            return None
        out = folders.run_of(path)
        if not folders.holds_run(out):
            raise FileNotFoundError(f"{out} holds no checkpoint and no {folders.OPTIONS}; there is no run to resume")
        lock, state = Place(out), folders.find_state(path)
        if state is None:
            config = folders.options_to_resume(folders.recorded_options(out), options, out)
            say(f"{out} has no checkpoint yet: the run starts again with its recorded options")
        elif not isinstance(saved := state.extra.get("train_config"), dict):
            raise ValueError(f"{state.path} has no options of a run; give a folder that gpt2-fast train made")
        else:
            config = folders.options_to_resume(saved, options, out)
        return {"out": str(out), "config": dataclasses.asdict(config), "state": state and _without_tensors(state)}

    try:
        found = group.decide(find)
        if found is None:
            return start_run(options)
        config = TrainConfig(**found["config"])
        check_world(group.world, config.grad_accum)
        group.set_limit(config.timeout_minutes)
        if state is None and found["state"] is not None:  # another process has read it
            state = _of_another(**found["state"])
        return Run(config, Path(found["out"]), state, lock, group)
    except BaseException:
        if lock is not None:
            lock.release()  # who keeps the error keeps the lock with it
        raise


def _without_tensors(state: checkpoint.TrainingState) -> dict[str, Any]:
    """What the other processes are told of it. Its tensors come later, by the optimizer."""
    config = dataclasses.asdict(state.config)
    return {"step": state.step, "config": config, "extra": state.extra, "path": str(state.path)}


def _of_another(step: int, config: dict[str, Any], extra: dict[str, Any], path: str) -> checkpoint.TrainingState:
    return checkpoint.TrainingState(step, GPT2Config(**config), {}, {}, {}, extra, Path(path))
