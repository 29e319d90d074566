"""A training run: its folder, its data, and the loop of `gpt2-fast train`.

Nothing in a step waits for the device: the loss that the progress bar shows is the previous step's, read while this
one runs. Batches are a function of (seed, step), so a resumed run continues with the data it would have seen.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from gpt2_fast import checkpoint
from gpt2_fast.data import get_tokenizer, load_data
from gpt2_fast.evaluate import dataset_loss
from gpt2_fast.files import atomic_write
from gpt2_fast.generate import generate
from gpt2_fast.ops.embedding import check_ids
from gpt2_fast.ops.runtime.memory import retain_memory
from gpt2_fast.report.figures import save_loss_plot
from gpt2_fast.report.machine import resolve_device
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.step import Step, build_model, build_optimizer


class Run:
    """A training run: its model, data and optimizer, its folder, and the loop."""

    def __init__(self, config: TrainConfig, resume: str | None = None):
        self.config = config
        self.device = resolve_device(config.device)
        if self.device.type == "cpu":
            retain_memory()
        state = None if resume is None else checkpoint.load_training_state(resume)
        self.model = build_model(config, self.device, state and state.config).train()
        self.context = config.context or self.model.config.n_positions
        self.train_data, self.val_data = load_data(
            config.data, context=self.context, vocab_size=self.model.config.vocab_size
        )
        self.optimizer = build_optimizer(self.model, config)
        self.out = prepare_folder(config, resume)
        self.step = 0
        self.pending: tuple[int, Tensor, Tensor | None, float] | None = None
        self.tokens_per_step = config.grad_accum * config.batch_size * self.context
        if state is not None:
            self._restore(state)
        self.run_step = Step(self.model, self.optimizer, config, self.context)
        self.interrupted = False

    def _restore(self, state: checkpoint.TrainingState) -> None:
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        checkpoint.restore_rng(state.rng)
        self.step = state.step
        self._forget_after(self.step)

    def _forget_after(self, step: int) -> None:
        """Takes from the log what was written after the checkpoint: those steps run again."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))

    def save(self) -> None:
        """The Hugging Face folder and everything that an exact resume needs, each file replaced in one move."""
        weights = self.model.state_dict()
        checkpoint.save_pretrained(self.out / "checkpoint", weights, self.model.config)
        checkpoint.save_training_state(
            self.out, step=self.step, config=self.model.config, model_state=weights,
            optimizer_state=self.optimizer.state_dict(), extra={"train_config": dataclasses.asdict(self.config)},
        )  # fmt: skip

    def log(self, **record) -> None:
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, **record}) + "\n")

    def validate(self) -> float:
        size, batches = self.config.batch_size, self.config.eval_batches
        loss = dataset_loss(self.model, self.val_data, batch_size=size, limit=batches * size)["loss"]
        self.log(val_loss=loss)
        return loss

    def sample(self, max_new_tokens: int = 60) -> str:
        """A continuation of <|endoftext|>, seeded by the run's seed."""
        tokenizer = get_tokenizer()
        room = self.model.config.n_positions - 1
        tokens = generate(
            self.model,
            [[tokenizer.eot_token]],
            min(max_new_tokens, room),
            temperature=0.8,
            top_k=50,
            seed=self.config.seed,
        )
        return tokenizer.decode(tokens[0])

    def _on_interrupt(self, *_):
        if self.interrupted:  # a second Ctrl-C does not wait for the step
            raise KeyboardInterrupt
        self.interrupted = True

    def train(self) -> None:
        """Runs to config.steps, or until Ctrl-C, and leaves metrics.jsonl, loss.png and checkpoint/ behind."""
        config = self.config
        first_loss = self.validate()
        print(f"validation loss before: {first_loss:.4f}")
        previous_handler = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            self._loop()
        finally:
            signal.signal(signal.SIGINT, previous_handler)
        last_loss = self.validate()
        self.save()
        save_loss_plot(self.out / "metrics.jsonl", self.out / "loss.png")
        print(f"validation loss after:  {last_loss:.4f}")
        if self.interrupted:
            print(f"stopped at step {self.step} of {config.steps}; continue with: gpt2-fast train --resume {self.out}")
        else:
            print(f"sample:\n{self.sample()}\n")
        get_tokenizer().save_pretrained(self.out / "checkpoint")
        for name in ("metrics.jsonl", "loss.png", "checkpoint"):
            print(f"{self.out / name}")

    def _loop(self) -> None:
        config = self.config
        with tqdm(total=config.steps, initial=self.step, unit="step", dynamic_ncols=True) as bar:
            while self.step < config.steps and not self.interrupted:
                started = time.perf_counter()
                loss = self.run_step(*self._batches(), config.learning_rate(self.step))
                self._report(bar)  # of the step before: its loss is there by now, so nothing waits
                self.step += 1
                self.pending = (self.step, loss, self.optimizer.last_grad_norm, time.perf_counter() - started)
                bar.update()
                self._periodically(bar)
            self._report(bar)

    def _batches(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this step, int64 [grad_accum, B, T]."""
        options = {"batch_size": self.config.batch_size, "seed": self.config.seed}
        batches = [self.train_data.batch(self.step, micro, **options) for micro in range(self.config.grad_accum)]
        inputs, targets = (torch.stack(side) for side in zip(*batches, strict=True))
        return inputs, targets

    def _report(self, bar: tqdm) -> None:
        """Reads the pending step's loss into the bar and the log."""
        if self.pending is None:
            return
        (step, loss, grad_norm, seconds), self.pending = self.pending, None
        check_ids()
        value, lr = loss.item(), self.config.learning_rate(step - 1)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step}; lower --lr (it was {lr:.2e}) or use --dtype float32"
            )
        rate = self.tokens_per_step / seconds
        bar.set_postfix_str(f"loss {value:.3f}, lr {lr:.1e}, {rate:,.0f} tok/s")
        norm = {} if grad_norm is None else {"grad_norm": round(grad_norm.item(), 5)}
        self.log(step=step, loss=value, lr=lr, **norm, tokens_per_second=round(rate, 1))

    def _periodically(self, bar: tqdm) -> None:
        config, last = self.config, self.step >= self.config.steps
        due = [
            n and self.step % n == 0 and not last for n in (config.eval_every, config.sample_every, config.save_every)
        ]
        if any(due):
            self._report(bar)  # what is saved is logged, and the clock stands still meanwhile
        if due[0]:
            bar.write(f"step {self.step}: validation loss {self.validate():.4f}")
        if due[1]:
            bar.write(f"step {self.step}: {self.sample()!r}")
        if due[2]:
            self.save()


def prepare_folder(config: TrainConfig, resume: str | None) -> Path:
    """The run's folder, made and known to be writable; refuses one that holds another run."""
    if resume is not None:
        return Path(resume)
    out = Path(config.out or f"runs/{config.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (out / "metrics.jsonl").exists():
        raise ValueError(f"--out {out} holds a run already; continue it with --resume {out}, or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}); choose another --out") from None
    return out


def start_run(options: dict) -> Run:
    """A new run with these options (the fields of TrainConfig)."""
    return Run(TrainConfig(**options))


def resume_run(folder: str, options: dict) -> Run:
    """Continues the run in `folder` with the options it had, except those given again."""
    saved = checkpoint.load_training_state(folder).extra["train_config"]
    fixed = {"model", "init_from", "dropout", "out"} & options.keys()
    if fixed:
        flag = sorted(fixed)[0].replace("_", "-")
        raise ValueError(f"--{flag} cannot change when a run is resumed; start a new run for that")
    return Run(TrainConfig(**{**saved, **options}), resume=folder)
