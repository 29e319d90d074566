"""Where a run writes: its folder, its log, its trackers. The first process alone does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt2_fast import checkpoint
from gpt2_fast.train import folder as folders
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.log import MetricsLog
from gpt2_fast.train.place import Place, Taken
from gpt2_fast.train.progress import Voice
from gpt2_fast.train.stop import Ending
from gpt2_fast.train.trackers import Trackers


class Home:
    """A run's folder, and what is written to it while the run goes on, wherever the folder is by then.

    Args:
        out: the folder.
        lock: of it; None in all processes but the first, for which the other calls do nothing.
        config: the options, which are recorded in it.
        ending: learns that another run has the folder.
        say: says that the folder was gone.

    Attributes:
        out: the folder; another one beside it once it is another run's.
        made_again: whether the folder was gone, and is to have a checkpoint soon.
    """

    def __init__(self, out: Path, lock: Place | None, config: TrainConfig, ending: Ending, say: Voice):
        self.out, self.lock, self.say = out, lock, say
        self.log = MetricsLog(out / folders.METRICS)
        self.trackers: Trackers | None = None
        self.made_again = False
        self._config, self._ending = config, ending

    def begin(self, state: checkpoint.TrainingState | None) -> list[tuple[int, float]]:
        """Makes folder and log those of the steps up to `state`. Returns the steps and validation losses in it.

        Raises ValueError, one line, before anything is changed.
        """
        step, records = 0, []  # a run that starts again validates again
        if state is not None:
            step, records = state.step, self.log.up_to(state.step)
        self.trackers = Trackers(self._config, self.out, step, records)
        folders.take_over(self.out, state)
        self.log.keep(records)
        folders.record_options(self.out, self._config)
        return [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]

    def record(self, **record: Any) -> None:
        """The numbers of a step, or of a validation, to wherever they are kept."""
        if self.lock is not None:
            self.stay()
            self.log.write(**record)
            self.trackers.write(record)

    def stay(self) -> None:
        """Before something is written: the folder may have been moved away, and another run's be in its place."""
        if self.lock is None:
            return
        try:
            gone = self.lock.check()
        except OSError:
            return  # what is to be written says so
        except Taken as error:
            self.out = self.lock.move()
            self._ending.fault = self._ending.fault or ValueError(str(error))
            self.log.path = self.out / folders.METRICS
            folders.record_options(self.out, self._config)
        else:
            self.made_again = self.made_again or gone
            if gone:
                self._begin_again()

    def settle(self) -> None:
        """Before a checkpoint is written, which is not to be newer than its log. Raises Taken and OSError."""
        if self.lock.check():
            self._begin_again()
        self.log.settle()
        self.trackers.flush()

    def _begin_again(self) -> None:
        """In a folder that was gone."""
        folders.record_options(self.out, self._config)
        self.say(f"{self.out} was moved away or removed: it is made again, and the run saves there", to="stderr")

    def leave(self) -> None:
        try:
            if self.trackers is not None:
                self.trackers.close()
        finally:
            if self.lock is not None:
                self.lock.release()
