"""A training run: its folder, its data, and the loop of `gpt2-fast train`.

Nothing in a step waits for the device: batches are made ahead by a thread, and the loss that the progress bar shows is
the previous step's, read while this one runs. Batches are a function of (seed, step), so a resumed run continues with
the data it would have seen. A checkpoint is written beside the steps.

Several processes run the same loop. What depends on a clock or a signal they agree on at every step; the first of them
alone prints, and writes to the folder.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2_fast import checkpoint
from gpt2_fast.checkpoint.run_folder import checkpoints, save_checkpoint
from gpt2_fast.data import load_data
from gpt2_fast.evaluate import dataset_loss
from gpt2_fast.generate import tokenizer_of
from gpt2_fast.ops.runtime.memory import retain_memory
from gpt2_fast.parallel.group import Group
from gpt2_fast.report.machine import environment
from gpt2_fast.train import folder as folders
from gpt2_fast.train.ahead import Ahead
from gpt2_fast.train.conclusion import conclude, fail, finished, sample, settle
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.finite import check_step, check_validation, check_weights
from gpt2_fast.train.going_on import take_up
from gpt2_fast.train.log import MetricsLog
from gpt2_fast.train.place import Place, Taken
from gpt2_fast.train.processes import check_dtype, local_device, open_group
from gpt2_fast.train.progress import Progress
from gpt2_fast.train.readout import Readout
from gpt2_fast.train.saving import Saver
from gpt2_fast.train.say import say
from gpt2_fast.train.step import Step, build_model, build_optimizer, micro_batches
from gpt2_fast.train.stop import Stop, Stopped
from gpt2_fast.train.trackers import Trackers, check_installed
from gpt2_fast.train.verify import FaultyMachine, Verifier


class Pending(NamedTuple):
    """A step whose loss is still on its way to the host."""

    step: int
    place: int
    seconds: float


class Run:
    """A training run: its model, data and optimizer, its folder, and the loop.

    Args:
        config: the options.
        out: the run's folder; None: a new one, as `config` says.
        state: what the run goes on from; its tensors are read in the first process alone.
        lock: of `out`; None: it is taken here.
        group: the processes of the run; None: as torchrun has started them.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path | None = None,
        state: checkpoint.TrainingState | None = None,
        lock: Place | None = None,
        group: Group | None = None,
    ):
        check_installed(config)
        self.group = group = group or open_group(config)
        self.device = local_device(config.device)
        check_dtype(config, self.device)
        if self.device.type == "cpu":
            retain_memory()
        new = out is None
        self.out = out or Path(group.decide(lambda: str(folders.new_folder(config))))
        self.model = build_model(config, self.device, state and state.config, group).train()
        self.context = config.context or self.model.config.n_positions
        self.config = config = config.for_context(self.context)
        weights = config.init_from if state is None else state.path and state.path.parent
        self.tokenizer = tokenizer_of(self.model.config.vocab_size, weights, config.data)
        self.train_data, self.val_data = group.in_turn(
            lambda: load_data(
                config.data, context=self.context, vocab_size=self.model.config.vocab_size, progress=not config.quiet
            )
        )
        self.optimizer = build_optimizer(self.model, config, group)
        self.environment = environment(self.device)
        self.fingerprint = self.train_data.fingerprint()
        group.same(self.environment, "the processes run on other devices, threads or versions; their bits would differ")
        self.validation, where = self._validation(), f"is --data {config.data} the same everywhere?"
        group.same(self.fingerprint, f"the processes read other data; {where}")
        group.same(self.validation, f"the processes read other validation data; {where}")
        self.lock = lock
        if group.first:
            self.lock = lock or Place(self.out, new)
        self.log, self.trackers = MetricsLog(self.out / folders.METRICS), None
        self.step, self.saved = 0, None
        self.best, self.best_step = math.inf, None  # of the first process, which writes checkpoints
        self.best_from = 0  # validations of earlier steps are of other data
        self.tokens_per_step = config.grad_accum * config.batch_size * self.context
        if state is not None:
            take_up(self, state)
        self.run_step = Step(self.model, self.optimizer, config, self.context, group)
        self.loss_scale = self.run_step.loss_scale
        if self.loss_scale is not None and state is not None and "loss_scale" in state.extra:
            self.loss_scale.load_state_dict(state.extra["loss_scale"])
        self.validated = dict(group.decide(lambda: self._begin(state)))  # from here on nothing is refused
        self.readout, self.pending = Readout(self.device), None
        self.verifier = Verifier(self._state)
        self.saver, self.stop = Saver(self._write), Stop()
        self._agreed: str | None = None
        self.fault: Exception | None = None  # what ends the run, in this process
        self.failing = False  # whether a process has one, as far as all of them know
        self._save_soon = False

    def _validation(self) -> dict[str, Any]:
        """What a validation is computed on: losses are compared where it is the same."""
        count = min(self.config.eval_batches * self.config.batch_size, self.val_data.n_windows)
        return {"data": self.val_data.fingerprint(), "context": self.context, "windows": count}

    def _begin(self, state: checkpoint.TrainingState | None) -> list[tuple[int, float]]:
        """Makes folder and log those of the steps so far. Returns the steps and validation losses in it."""
        records = [] if state is None else self.log.up_to(self.step)  # a run that starts again validates again
        self.trackers = Trackers(self.config, self.out, self.step, records)
        folders.take_over(self.out, state)
        self.log.keep(records)
        folders.record_options(self.out, self.config)
        return [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]

    def say(self, text: str, bar: Progress | None = None, to: str = "stdout") -> None:
        """In the first process. With --quiet, what goes to stderr alone."""
        if self.group.first and (to == "stderr" or not self.config.quiet):
            say(text, to) if bar is None else bar.write(text, to)

    @property
    def _last_lr(self) -> float:
        """Of the step that was taken last."""
        return self.config.learning_rate(max(self.step - 1, 0))

    def _record(self, **record: Any) -> None:
        """The numbers of a step, or of a validation, to wherever they are kept."""
        if self.group.first:
            self.stay_at_home()
            self.log.write(**record)
            self.trackers.write(record)

    def stay_at_home(self) -> None:
        """Before the first process writes: the folder may have been moved away, and another run's be in its place."""
        try:
            gone = self.lock.check()
        except OSError:
            return  # what is to be written says so
        except Taken as error:
            self.out = self.lock.move()
            self.fault = self.fault or ValueError(str(error))
            self.log.path = self.out / folders.METRICS
            folders.record_options(self.out, self.config)
        else:
            self._save_soon = self._save_soon or gone
            if gone:
                self._begin_again()

    def _begin_again(self) -> None:
        """In a folder that was gone."""
        folders.record_options(self.out, self.config)
        self.say(f"{self.out} was moved away or removed: it is made again, and the run saves there", to="stderr")

    @property
    def ending(self) -> bool:
        """Whether no more steps are to be taken: a signal has come, or a process has a fault."""
        return self.failing or self.asked is not None

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self.asked is not None

    @property
    def asked(self) -> str | None:
        """The signal that asks the run to end; with several processes, as far as all of them know of it."""
        return self.stop.asked if self.group.world == 1 else self._agreed

    def agree(self, late: bool = False) -> bool:
        """Makes a signal to any process, or a fault of it, known to all. Returns whether the first one says `late`."""
        mine = self.stop.asked
        asked, late, failing = self.group.agree(
            signal.Signals[mine] if mine else 0, int(late and self.group.first), int(self.fault is not None)
        )
        self.failing = self.failing or bool(failing)
        if asked:
            self._agreed = signal.Signals(asked).name
        return bool(late)

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that a step changes, by name."""
        named = {name: p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            named |= {f"{name}'s {key}": t for key, t in self.optimizer.state.get(p, {}).items()}
        return named if self.loss_scale is None else named | self.loss_scale.tensors()

    def save(self, best: float | None = None, beside: bool = False) -> None:
        """A checkpoint of this step. beside: return when it is copied, and write it while steps go on.

        best: its validation loss, where that is the best so far. It is the run's when the checkpoint is there.

        Every process calls it, and sends its part of the state to the first, which writes.

        Raises OSError, one line, where the disk has no room, and FloatingPointError where a weight is not finite; the
        checkpoints that were there are there still.
        """
        check_weights(self.model, self.step, self._last_lr)
        self.saved = self.step
        self.saver.settle()  # before another state is gathered
        optimizer_state = self.optimizer.state_dict()
        if not self.group.first:
            return
        self.saver.save(
            {
                "step": self.step,
                "model_state": self.model.state_dict(),
                "optimizer_state": optimizer_state,
                "rng": {"cpu": torch.get_rng_state(), "cuda": []},  # a step draws nothing: for readers of this version
                "extra": {
                    "train_config": dataclasses.asdict(self.config), "environment": self.environment,
                    "data": self.fingerprint, "validation": self.validation,
                    "best": self.best if best is None else best,
                    "best_step": self.best_step if best is None else self.step,
                    **({} if self.loss_scale is None else {"loss_scale": self.loss_scale.state_dict()}),
                },
                "best": best is not None,
            },
            beside,
            own=("optimizer_state",) if self.group.world > 1 else (),
        )  # fmt: skip

    def _write(self, **state: Any) -> None:
        if self.lock.check():
            self._begin_again()
        self.log.settle()  # no checkpoint is newer than its log
        self.trackers.flush()
        save_checkpoint(self.out, config=self.model.config, tokenizer=self.tokenizer, keep=self.config.keep, **state)
        self.best, self.best_step = state["extra"]["best"], state["extra"]["best_step"]

    def _save_beside(self, bar: Progress, best: float | None = None) -> None:
        """Training goes on when a disk is full: the next save may fit."""
        try:
            self.save(best, beside=True)
        except (OSError, Taken) as error:
            self._report_failed_save(bar, error)

    def _report_failed_save(self, bar: Progress, error: Exception | None) -> None:
        if error is None:
            return
        if not isinstance(error, (OSError, Taken)):
            raise error
        self.saved = None
        if isinstance(error, Taken):
            return self.stay_at_home()
        self.say(f"{error}; the checkpoints before it are kept, and training goes on", bar, "stderr")

    def validate(self) -> float:
        """The validation loss of this step, logged once. Raises Stopped when a signal comes meanwhile."""
        if self.step in self.validated:  # a resumed run has it in its log
            return self.validated[self.step]
        size, batches = self.config.batch_size, self.config.eval_batches

        def between() -> None:
            self.agree()
            if self.ending:
                raise Stopped

        options = {"batch_size": size, "limit": batches * size, "between": between, "group": self.group}
        try:
            loss = dataset_loss(self.model, self.val_data, **options)["loss"]
        except (ValueError, OSError) as error:
            self.fault = error
            self.agree()
            raise Stopped from None
        check_validation(loss, self.step, self._last_lr)
        self._record(step=self.step, val_loss=loss)
        self.validated[self.step] = loss
        return loss

    def sample(self, max_new_tokens: int = 60) -> str:
        """A text from its start, seeded by the run's seed; where it cannot be decoded, why: a run goes on."""
        return sample(self, max_new_tokens)

    def train(self) -> None:
        """Runs to config.steps, or until a signal asks to stop, and leaves metrics.jsonl, loss.png and checkpoint/."""
        try:
            with self.stop:
                self._train()
        finally:
            self._leave()

    def _train(self) -> None:
        try:
            if finished(self):
                return
            if self.step == 0:
                self.best = first = self.validate()  # what a checkpoint must be below, to be the best
                self.say(f"validation loss before: {first:.4f}")
            elif self.step in self.validated:
                self.say(f"validation loss of step {self.step}: {self.validated[self.step]:.4f}")
            self._loop()
            if not self.ending:
                self.say(f"validation loss after:  {self.validate():.4f}")
        except Stopped:
            pass
        settle(self)
        if self.failing:
            fail(self)
        self.save_last()
        if self.group.first:
            conclude(self)

    def save_last(self) -> None:
        """The checkpoint of the last step, where it is not there."""
        best = self._best(self.validated.get(self.step, math.inf) if self.step >= self.best_from else math.inf)
        (needed,) = self.group.agree(int(self.group.first and self._unsaved(best)))
        if needed:
            self.save(best)

    def _unsaved(self, best: float | None) -> bool:
        return self.saved != self.step or best is not None or not checkpoints(self.out)

    def _leave(self) -> None:
        try:
            self.saver.wait()
        except (OSError, Taken) as error:
            say(error, "stderr")
        finally:
            if self.trackers is not None:
                self.trackers.close()
            if self.lock is not None:
                self.lock.release()

    def _loop(self) -> None:
        config = self.config
        batches = Ahead(self._batches, self.step, config.steps)
        try:
            silent = config.quiet or not self.group.first
            with Progress(config.steps, self.step, config.log_every, silent) as bar:
                self._catch_up(bar)
                batch = self._next(batches)
                self.agree()
                while self.step < config.steps and not self.ending:
                    started = time.perf_counter()
                    loss = self._take(batch)
                    self._report(bar)  # of the step before: its loss is there by now, so nothing waits
                    self.step += 1
                    scaling = () if self.loss_scale is None else (self.loss_scale.scale, self.optimizer.last_found_inf)
                    place = self.readout.queue(loss, self.optimizer.last_grad_norm, *scaling)
                    batch = self._next(batches)  # here: `_periodically` tells all processes where there is none
                    self.pending = Pending(self.step, place, time.perf_counter() - started)
                    bar.advance()
                    self._periodically(bar)
                self._report(bar)
        finally:
            batches.close()

    def _next(self, batches: Ahead) -> tuple[Tensor, Tensor] | None:
        """The batch of the next step; None after the last, and where it cannot be read, which ends the run."""
        try:
            return next(batches, None)
        except (ValueError, OSError) as error:
            self.fault = error

    def _catch_up(self, bar: Progress) -> None:
        """The validation of the step that a run goes on from, where a signal came before it or in the middle of it."""
        every, there = self.config.eval_every, self.step in (0, self.config.steps) or self.step in self.validated
        if every and self.step % every == 0 and not there and (best := self._evaluate(bar)) is not None:
            self._save_beside(bar, best)

    def _take(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One step; where --verify-every says so, computed twice."""
        every, step = self.config.verify_every, self.step + 1
        take = lambda: self.run_step(*batch, self.config.learning_rate(self.step), self.step)
        if every and step % every == 0:
            try:
                return self.verifier.step(take, step)
            except FaultyMachine as error:
                raise FaultyMachine(f"{error}; nothing of it is saved, go on with --resume {self.out}") from None
        loss = take()
        if every and (step + 1) % every == 0:
            self.verifier.rest()
        return loss

    def _batches(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this process's micro-batches of a step, int64 [n, B, T], in memory from which a device
        copies by itself."""
        options = {name: getattr(self.config, name) for name in ("batch_size", "seed", "order", "grad_accum")}
        batches = [self.train_data.batch(step, micro, **options) for micro in micro_batches(self.config, self.group)]
        inputs, targets = (torch.stack(side) for side in zip(*batches, strict=True))
        return (inputs.pin_memory(), targets.pin_memory()) if self.device.type == "cuda" else (inputs, targets)

    def _report(self, bar: Progress) -> None:
        """Reads the pending step's loss into the bar and the log."""
        if self.pending is None:
            return
        (step, place, seconds), self.pending = self.pending, None
        reading, lr = self.readout.read(place), self.config.learning_rate(step - 1)
        check_step(reading, step, lr)
        loss, grad_norm, loss_scale, skipped = reading
        rate = self.tokens_per_step / seconds
        bar.report(step, loss, lr, rate)
        extra = {} if grad_norm is None or skipped else {"grad_norm": round(grad_norm, 5)}
        if loss_scale is not None:
            extra |= {"loss_scale": loss_scale, "skipped": skipped}
        self._record(step=step, loss=loss, lr=lr, **extra, tokens_per_second=round(rate, 1))

    def _best(self, loss: float) -> float | None:
        """`loss` where it is below that of the best checkpoint, else None. A save that is at work may fail."""
        self.saver.settle()
        return loss if self.group.decide(lambda: loss < self.best) else None

    def _evaluate(self, bar: Progress) -> float | None:
        """The validation loss of this step where it is the best so far, else None."""
        loss = self.validate()
        best = self._best(loss)
        self.say(f"step {self.step}: validation loss {loss:.4f}{', the best so far' if best is not None else ''}", bar)
        return best

    def _periodically(self, bar: Progress) -> None:
        config, last = self.config, self.step >= self.config.steps
        evaluate, show, save = (
            n and self.step % n == 0 and not last for n in (config.eval_every, config.sample_every, config.save_every)
        )
        late = bool(config.save_minutes) and time.monotonic() - self.saver.last >= 60 * config.save_minutes
        late = self.agree(late or self._save_soon)
        best, self._save_soon = None, False
        self._report_failed_save(bar, self.saver.take_error())
        if evaluate or show or save or late:
            self._report(bar)  # what is saved is logged, and the clock stands still meanwhile
        if evaluate:
            best = self._evaluate(bar)
        if show and self.group.first and not config.quiet:
            bar.write(f"step {self.step}: {self.sample()!r}")
        if not last and (save or late or best is not None):
            self._save_beside(bar, best)
