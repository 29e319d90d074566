"""The numbers of metrics.jsonl in TensorBoard and Weights & Biases too: same names, same values.

metrics.jsonl is what a run is resumed by. A tracker that has nothing of the run yet is first given what stands there.
One that fails is left out from then on, in one line, and training goes on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.say import say

Record = dict[str, Any]
TENSORBOARD, WANDB_ID = "tensorboard", "wandb-id"  # in the run's folder


class Tracker(Protocol):
    new: bool  # whether it has nothing of this run yet

    def write(self, record: Record) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder. What is newer than the step that the run goes on from is taken back."""

    def __init__(self, out: Path, config: TrainConfig, step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = out / TENSORBOARD
        self.new = not any(folder.glob("events.*"))
        self._writer = SummaryWriter(str(folder), purge_step=None if self.new else step + 1)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, whose id lies in the run's folder. Its x-axis is "step", which may go back."""

    def __init__(self, out: Path, config: TrainConfig, step: int):
        import wandb

        path = out / WANDB_ID
        self.new = not path.is_file()
        known = None if self.new else path.read_text().strip()
        project = os.environ.get("WANDB_PROJECT", "gpt2_fast")
        options = {"name": out.name, "dir": str(out), "config": dataclasses.asdict(config)}
        settings = wandb.Settings(silent=config.quiet)
        self._run = wandb.init(project=project, id=known, resume="allow", settings=settings, **options)
        self._run.define_metric("*", step_metric="step")
        if self.new:
            path.write_text(f"{self._run.id}\n")

    def write(self, record: Record) -> None:
        self._run.log(record)

    def flush(self) -> None:
        pass  # another process has it, which outlives this one

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_installed(config: TrainConfig) -> None:
    """Raises ValueError, one line with the command that installs what --log asks for, before anything is built."""
    for name in config.logs:
        if name in KINDS and importlib.util.find_spec(name) is None:
            raise ValueError(f"--log {name} needs the package {name}; run: pip install {name}")


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


class Trackers:
    """The trackers of a run that --log names besides metrics.jsonl. Raises ValueError where one cannot be opened.

    Args:
        records: of metrics.jsonl, up to `step`.
    """

    def __init__(self, config: TrainConfig, out: Path, step: int, records: Sequence[Record]):
        self._open: dict[str, Tracker] = {}
        for name in config.logs:
            if name in KINDS:
                try:
                    self._open[name] = tracker = KINDS[name](out, config, step)
                    for record in records if tracker.new else ():
                        tracker.write(record)
                except Exception as error:
                    raise ValueError(f"--log {name} cannot be opened ({_reason(error)})") from error

    def _attempt(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # of a library that is not this one's, and no reason to lose a run
            self._open.pop(name, None)
            say(f"--log {name} failed ({_reason(error)}); training goes on without it", "stderr")

    def write(self, record: Record) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, lambda tracker=tracker: tracker.write(record))

    def flush(self) -> None:
        """What was written is on the disk when a checkpoint is."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.flush)

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.close)
        self._open = {}
