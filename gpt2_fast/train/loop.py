"""A training run: its folder, its data, and the loop of `gpt2-fast train`.

Nothing in a step waits for the device: batches are made ahead by a thread, and the loss that the progress bar shows is
the previous step's, read while this one runs. Batches are a function of (seed, step), so a resumed run continues with
the data it would have seen. A checkpoint is written beside the steps.

Several processes run the same loop. What depends on a clock or a signal they agree on at every step; the first of them
alone prints, and writes to the folder.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2_fast import checkpoint
from gpt2_fast.data import load_data
from gpt2_fast.generate import tokenizer_of
from gpt2_fast.ops.runtime.memory import retain_memory
from gpt2_fast.parallel.group import Group
from gpt2_fast.train import folder as folders
from gpt2_fast.train.ahead import Ahead
from gpt2_fast.train.checkpoints import Best, Checkpoints
from gpt2_fast.train.conclusion import conclude, fail, finished
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.finite import check_step
from gpt2_fast.train.going_on import compare, take_up
from gpt2_fast.train.home import Home
from gpt2_fast.train.place import Place
from gpt2_fast.train.processes import check_dtype, local_device, open_group
from gpt2_fast.train.progress import Progress, Voice
from gpt2_fast.train.readout import Readout
from gpt2_fast.train.sample import sample
from gpt2_fast.train.setting import Setting
from gpt2_fast.train.step import Step, build_model, build_optimizer, micro_batches
from gpt2_fast.train.stop import Ending, Stopped
from gpt2_fast.train.trackers import check_installed
from gpt2_fast.train.validation import Validation
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
        out = out or Path(group.decide(lambda: str(folders.new_folder(config))))
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
        self.tokens_per_step = config.grad_accum * config.batch_size * self.context
        setting = Setting.here(config, self.context, self.device, self.train_data, self.val_data)
        setting.check_same(group, config)
        self.ending, self.say = Ending(group), Voice(group.first, config.quiet)
        self.home = Home(out, (lock or Place(out, new)) if group.first else None, config, self.ending, self.say)
        try:
            self._begin(state, setting)
        except BaseException:
            self.home.leave()  # who keeps the error, as a notebook does, keeps this run with it
            raise

    def _begin(self, state: checkpoint.TrainingState | None, setting: Setting) -> None:
        """Goes on from `state`, or begins, in a folder that is the run's."""
        config, group = self.config, self.group
        best, self.step = Best(), 0
        if state is not None:
            take_up(state, self.model, self.optimizer, group)
            best, self.step = compare(state, config, setting, self.say), state.step
        self.run_step = Step(self.model, self.optimizer, config, self.context, group)
        self.loss_scale = self.run_step.loss_scale
        if self.loss_scale is not None and state is not None and "loss_scale" in state.extra:
            self.loss_scale.load_state_dict(state.extra["loss_scale"])
        losses = dict(group.decide(lambda: self.home.begin(state)))  # from here on nothing is refused
        self.validation = Validation(self.model, self.val_data, config, group, self.ending, self.home.record, losses)
        saved = None if state is None else state.step
        self.checkpoints = Checkpoints(self.run_step, self.tokenizer, setting, self.home, best, saved)
        self.readout, self.pending = Readout(self.device), None
        self.verifier = Verifier(self.run_step.tensors)

    @property
    def out(self) -> Path:
        """The folder, wherever it is by now."""
        return self.home.out

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self.ending.asked is not None

    def save(self, best: float | None = None, beside: bool = False) -> None:
        """A checkpoint of this step, see `Checkpoints.save`."""
        self.checkpoints.save(self.step, best, beside)

    def validate(self) -> float:
        """The validation loss of this step, see `Validation.loss`."""
        return self.validation.loss(self.step)

    def sample(self, max_new_tokens: int = 60) -> str:
        """A text from its start, seeded by the run's seed; where it cannot be decoded, why: a run goes on."""
        return sample(self.model, self.tokenizer, max_new_tokens, self.config.seed)

    def train(self) -> None:
        """Runs to config.steps, or until a signal asks to stop, and leaves metrics.jsonl, loss.png and checkpoint/."""
        try:
            with self.ending.stop:
                self._train()
        finally:
            self._leave()

    def _train(self) -> None:
        validated = self.validation.losses
        try:
            if finished(self):
                return
            if self.step == 0:
                self.checkpoints.best.loss = first = self.validate()  # what a checkpoint must be below, to be the best
                self.say(f"validation loss before: {first:.4f}")
            elif self.step in validated:
                self.say(f"validation loss of step {self.step}: {validated[self.step]:.4f}")
            self._loop()
            if not self.ending.due:
                self.say(f"validation loss after:  {self.validate():.4f}")
        except Stopped:
            pass
        self.checkpoints.settle()
        self.home.stay()
        self.ending.agree()  # all know then where the run is
        if self.ending.failing:
            fail(self)
        self.save_last()
        if self.group.first:
            conclude(self)

    def save_last(self) -> None:
        """The checkpoint of the last step, where it is not there."""
        self.checkpoints.save_last(self.step, self.validation.losses.get(self.step, math.inf))

    def _leave(self) -> None:
        try:
            self.checkpoints.leave()
        finally:
            self.home.leave()

    def _loop(self) -> None:
        config = self.config
        batches = Ahead(self._batches, self.step, config.steps)
        try:
            silent = config.quiet or not self.group.first
            with Progress(config.steps, self.step, config.log_every, silent) as bar:
                self._catch_up(bar)
                batch = self._next(batches)
                self.ending.agree()
                while self.step < config.steps and not self.ending.due:
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
            self.ending.fault = error

    def _catch_up(self, bar: Progress) -> None:
        """The validation of the step that a run goes on from, where a signal came before it or in the middle of it."""
        every, there = self.config.eval_every, self.step in (0, self.config.steps, *self.validation.losses)
        if every and self.step % every == 0 and not there and (best := self._evaluate(bar)) is not None:
            self.checkpoints.save_beside(self.step, best, bar)

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
        check_step(reading, step, self.config)
        loss, grad_norm, loss_scale, skipped = reading
        rate = self.tokens_per_step / seconds
        bar.report(step, loss, lr, rate)
        extra = {} if grad_norm is None or skipped else {"grad_norm": round(grad_norm, 5)}
        if loss_scale is not None:
            extra |= {"loss_scale": loss_scale, "skipped": skipped}
        self.home.record(step=step, loss=loss, lr=lr, **extra, tokens_per_second=round(rate, 1))

    def _evaluate(self, bar: Progress) -> float | None:
        """The validation loss of this step where it is the best so far, else None."""
        loss = self.validate()
        best = self.checkpoints.better(loss)
        self.say(f"step {self.step}: validation loss {loss:.4f}{', the best so far' if best is not None else ''}", bar)
        return best

    def _periodically(self, bar: Progress) -> None:
        config, last = self.config, self.step >= self.config.steps
        evaluate, show, save = (
            n and self.step % n == 0 and not last for n in (config.eval_every, config.sample_every, config.save_every)
        )
        late = bool(config.save_minutes) and time.monotonic() - self.checkpoints.saver.last >= 60 * config.save_minutes
        late = self.ending.agree(late or self.home.made_again)
        best, self.home.made_again = None, False
        self.checkpoints.report_failed(bar)
        if evaluate or show or save or late:
            self._report(bar)  # what is saved is logged, and the clock stands still meanwhile
        if evaluate:
            best = self._evaluate(bar)
        if show and self.group.first and not config.quiet:
            bar.write(f"step {self.step}: {self.sample()!r}")
        if not last and (save or late or best is not None):
            self.checkpoints.save_beside(self.step, best, bar)
