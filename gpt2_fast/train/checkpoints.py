"""The checkpoints of a run, and which of them is the best."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from gpt2_fast.checkpoint import TrainingState
from gpt2_fast.checkpoint.run_folder import checkpoints, save_checkpoint
from gpt2_fast.data import Tokenizer
from gpt2_fast.data.characters import CharacterTokenizer
from gpt2_fast.train.finite import check_weights
from gpt2_fast.train.home import Home
from gpt2_fast.train.place import Taken
from gpt2_fast.train.progress import Progress
from gpt2_fast.train.saving import Saver
from gpt2_fast.train.say import say
from gpt2_fast.train.setting import Setting
from gpt2_fast.train.step import Step


@dataclasses.dataclass
class Best:
    """The best checkpoint so far, as the first process knows it, which writes them.

    loss: its validation loss, or that of the weights that the run began with; a better one is below it.
    step: None: no checkpoint is the best yet.
    since: the first step whose validation counts; those before are of other data.
    """

    loss: float = math.inf
    step: int | None = None
    since: int = 0

    @classmethod
    def of(cls, state: TrainingState) -> Best:
        return cls(state.extra.get("best", math.inf), state.extra.get("best_step"))


class Checkpoints:
    """Saves what a run is resumed from. Every process makes each call; the first alone writes.

    Args:
        run_step: has the model, the optimizer, the loss scale and the options.
        setting: what a checkpoint says that it was made with.
        home: where they are written.
        best: of the run so far.
        saved: the step that is saved already; None: none is.

    Attributes:
        saved: the step of the newest checkpoint, where it is there or being written; None where it could not be.
    """

    def __init__(
        self,
        run_step: Step,
        tokenizer: Tokenizer | CharacterTokenizer | None,
        setting: Setting,
        home: Home,
        best: Best,
        saved: int | None,
    ):
        self.best, self.saved, self.saver = best, saved, Saver(self._write)
        self._model, self._optimizer, self._loss_scale = run_step.model, run_step.optimizer, run_step.loss_scale
        self._config, self._group = run_step.config, run_step.group
        self._tokenizer, self._setting, self._home = tokenizer, setting, home

    def save(self, step: int, best: float | None = None, beside: bool = False) -> None:
        """A checkpoint of this step. beside: return when it is copied, and write it while steps go on.

        best: its validation loss, where that is the best so far. It is the run's when the checkpoint is there.

        Every process calls it, and sends its part of the state to the first, which writes.

        Raises OSError, one line, where the disk has no room, and FloatingPointError where a weight is not finite; the
        checkpoints that were there are there still.
        """
        check_weights(self._model, step, self._config)
        self.saved = step
        self.saver.settle()  # before another state is gathered
        optimizer_state = self._optimizer.state_dict()
        if not self._group.first:
            return
        scale = {} if self._loss_scale is None else {"loss_scale": self._loss_scale.state_dict()}
        self.saver.save(
            {
                "step": step,
                "model_state": self._model.state_dict(),
                "optimizer_state": optimizer_state,
                "rng": {"cpu": torch.get_rng_state(), "cuda": []},  # a step draws nothing: for readers of this version
                "extra": {
                    "train_config": dataclasses.asdict(self._config), **self._setting._asdict(),
                    "best": self.best.loss if best is None else best,
                    "best_step": self.best.step if best is None else step,
                    **scale,
                },
                "best": best is not None,
            },
            beside,
            own=("optimizer_state",) if self._group.world > 1 else (),
        )  # fmt: skip

    def _write(self, **state: Any) -> None:
        self._home.settle()
        save_checkpoint(
            self._home.out, config=self._model.config, tokenizer=self._tokenizer, keep=self._config.keep, **state
        )
        self.best.loss, self.best.step = state["extra"]["best"], state["extra"]["best_step"]

    def save_beside(self, step: int, best: float | None, bar: Progress) -> None:
        """`save` beside the steps. Training goes on when a disk is full: the next save may fit."""
        try:
            self.save(step, best, beside=True)
        except (OSError, Taken) as error:
            self._report(error, bar)

    def report_failed(self, bar: Progress) -> None:
        """Says why a save beside the steps has failed, if one has, or raises what it should not have raised."""
        if (error := self.saver.take_error()) is not None:
            self._report(error, bar)

    def _report(self, error: Exception, bar: Progress) -> None:
        if not isinstance(error, (OSError, Taken)):
            raise error
        self.saved = None
        if isinstance(error, Taken):
            return self._home.stay()
        self._home.say(f"{error}; the checkpoints before it are kept, and training goes on", bar, "stderr")

    def better(self, loss: float) -> float | None:
        """`loss` where it is below that of the best checkpoint, else None. A save that is at work may fail."""
        self.saver.settle()
        return loss if self._group.agree(int(self._group.first and loss < self.best.loss))[0] else None

    def save_last(self, step: int, loss: float) -> None:
        """The checkpoint of the last step, where it is not there. loss: its validation loss; inf: it has none."""
        best = self.better(loss if step >= self.best.since else math.inf)
        (needed,) = self._group.agree(int(self._group.first and self._unsaved(step, best)))
        if needed:
            self.save(step, best)

    def _unsaved(self, step: int, best: float | None) -> bool:
        return self.saved != step or best is not None or not checkpoints(self._home.out)

    def settle(self) -> None:
        """Waits for the save that is at work; one that failed matters no more."""
        try:
            self.saver.wait()
        except OSError as error:
            self.saved = None
            say(error, "stderr")
        except Taken:
            self.saved = None

    def leave(self) -> None:
        """Waits for the save that is at work, when the run ends in whatever way."""
        try:
            self.saver.wait()
        except (OSError, Taken) as error:
            say(error, "stderr")
