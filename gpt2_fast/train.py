"""The training loop of `gpt2-fast train`.

One step: grad_accum micro-batches, forward and backward, then clip and AdamW in one fused update. Nothing in a
step waits for the device: the loss that the progress bar shows is the previous step's, read while this one runs.
Batches are a function of (seed, step), so a resumed run continues with the data it would have seen.
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
from gpt2_fast.config import GPT2Config
from gpt2_fast.convert import load as load_any
from gpt2_fast.data import load_data
from gpt2_fast.evaluate import dataset_loss
from gpt2_fast.files import atomic_write
from gpt2_fast.generate import generate
from gpt2_fast.model import GPT2LMHeadModel, Impl
from gpt2_fast.ops.embedding import check_ids
from gpt2_fast.ops.runtime.memory import retain_memory
from gpt2_fast.optim import AdamW
from gpt2_fast.plots import save_loss_plot
from gpt2_fast.tokenizer import get_tokenizer
from gpt2_fast.train_config import TrainConfig


def resolve_device(name: str) -> torch.device:
    """The torch device of --device; auto takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}; choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device is {name!r} and torch finds no CUDA device; use --device cpu, or see gpt2-fast doctor"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; choose auto, cpu, cuda or cuda:N")
    return device


def build_model(config: TrainConfig, device: torch.device, model_config: GPT2Config | None = None) -> GPT2LMHeadModel:
    """The model of a run on its device, in float32: `build_optimizer` casts it.

    Its weights are those of --init-from, else fresh ones. model_config: of a run that is resumed, whose weights
    are loaded later. --dropout, where it is given, replaces what the checkpoint's config says.
    """
    state = None
    if model_config is None and config.init_from is not None:
        loaded = load_any(config.init_from)
        model_config, state = loaded.config, loaded.state
        if config.dropout is not None:
            model_config = dataclasses.replace(model_config, **_dropout(config.dropout))
    if model_config is None:
        model_config = GPT2Config.from_preset(config.model, **_dropout(config.dropout or 0.0))
    context = config.context or model_config.n_positions
    if context > model_config.n_positions:
        name = config.init_from or config.model
        raise ValueError(f"--context is {context} and {name} has {model_config.n_positions} positions; lower --context")
    torch.manual_seed(config.seed)
    model = GPT2LMHeadModel(model_config, impl=config.impl)
    if state is not None:
        model.load_state_dict(state)
    model.gradient_checkpointing_enable(config.recompute)
    return model.to(device)


def _dropout(p: float) -> dict[str, float]:
    return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), p)


def build_optimizer(model: GPT2LMHeadModel, config: TrainConfig) -> AdamW:
    """AdamW with weight decay on matrices and embeddings alone: not on biases and LayerNorms.

    Casts the model to the run's dtype, with its float32 weights as the optimizer's masters.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    clip = config.grad_clip or None
    betas, impl = (config.beta1, config.beta2), Impl(config.impl, parameters[0].device.type)("adamw")
    optimizer = AdamW(groups, lr=config.lr, betas=betas, eps=1e-8, clip_grad_norm=clip, impl=impl)
    if config.dtype != "float32":
        optimizer.cast(model, getattr(torch, config.dtype))
    return optimizer


class Step:
    """Forward, backward and update over fixed input buffers; replayed as one CUDA graph if asked to."""

    def __init__(self, model: GPT2LMHeadModel, optimizer: AdamW, config: TrainConfig, context: int):
        self.model, self.optimizer, self.config = model, optimizer, config
        device = model.lm_head.weight.device
        shape = (config.grad_accum, config.batch_size, context)
        self.inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        self.targets = torch.zeros_like(self.inputs)
        self.loss = torch.zeros((), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._runs = 0
        self._graphed = config.compile_graph
        if self._graphed and device.type != "cuda":
            raise ValueError("--compile-graph needs a CUDA device; drop it, or use --device cuda")

    def _compute(self) -> None:
        n_items = self.targets.numel()
        loss = torch.zeros_like(self.loss)
        for x, y in zip(self.inputs, self.targets, strict=True):
            micro = self.model(x, targets=y, num_items_in_batch=n_items).loss
            micro.backward()
            loss += micro.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.copy_(loss)

    def __call__(self, inputs: Tensor, targets: Tensor, lr: float) -> Tensor:
        """One optimizer step on inputs and targets [grad_accum, B, T]; the mean loss, still on the device."""
        self.inputs.copy_(inputs, non_blocking=True)
        self.targets.copy_(targets, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._runs += 1
        if self._graphed and self._runs > 3:  # three eager steps first, so that lazy set-up is not captured
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._compute()
            self.optimizer.upload_hyperparameters()
            self.graph.replay()
        else:
            self._compute()
        return self.loss.clone()


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

    # ---- state on disk ----

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

    # ---- the loop ----

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
