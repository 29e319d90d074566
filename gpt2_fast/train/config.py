"""The options of a training run, without torch: the command line reads them before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from gpt2_fast.config import GPT2Config

DTYPES = ("float32", "bfloat16", "float16")
ORDERS = ("random", "epoch")
LOGS = ("jsonl", "tensorboard", "wandb")
SIZES = ("n_layer", "n_head", "n_embd")  # of the preset, which may be replaced
# What nanoGPT and transformers call an option, for those who type that.
OTHER_NAMES = {
    "block_size": "context", "max_length": "context", "learning_rate": "lr", "max_iters": "steps", "max_steps": "steps",
    "gradient_accumulation_steps": "grad_accum", "per_device_train_batch_size": "batch_size",
    "max_grad_norm": "grad_clip", "warmup_iters": "warmup", "warmup_steps": "warmup", "eval_interval": "eval_every",
    "eval_iters": "eval_batches",
    "eval_steps": "eval_every", "save_steps": "save_every", "save_total_limit": "keep", "logging_steps": "log_every",
    "out_dir": "out", "output_dir": "out", "adam_beta1": "beta1", "adam_beta2": "beta2", "dataset": "data",
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run; the command line has one flag for each."""

    model: str = "nano"
    n_layer: int | None = None  # None: the preset's
    n_head: int | None = None
    n_embd: int | None = None
    init_from: str | None = None
    data: str | None = None
    order: str = "random"
    steps: int = 300
    max_tokens: int | None = None  # in place of steps, until the size of a step is known: see `for_context`
    batch_size: int = 8
    context: int | None = None  # None: the model's n_positions
    grad_accum: int = 1
    lr: float = 1e-3
    warmup: int = 20
    min_lr: float | None = None  # None: a tenth of lr
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    dropout: float | None = None  # None: 0, or what the config of init_from says
    grad_clip: float = 1.0
    dtype: str = "float32"
    device: str = "auto"
    impl: str = "auto"
    seed: int = 1337
    eval_every: int = 100
    eval_batches: int = 20
    sample_every: int = 0
    save_every: int = 500
    save_minutes: float = 10.0
    keep: int = 2
    verify_every: int = 0
    recompute: bool = False
    compile_graph: bool = False
    timeout_minutes: float = 10.0
    log: str = "jsonl"
    log_every: int = 10
    quiet: bool = False
    out: str | None = None

    def __post_init__(self):
        for name in ("steps", "max_tokens", "context", "batch_size", "grad_accum", "eval_batches", "keep", "log_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "lr", "min_lr", "weight_decay", "warmup", "grad_clip", "eval_every", "sample_every", "save_every",
            "save_minutes", "verify_every",
        ):  # fmt: skip
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be a number of at least 0"
                )
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout is {self.dropout}; it must be at least 0 and below 1")
        if not 0 < self.timeout_minutes < 1e6:
            raise ValueError(f"--timeout-minutes is {self.timeout_minutes}; it must be above 0")
        if not -(2**63) <= self.seed < 2**64:  # what torch.manual_seed takes
            raise ValueError(f"--seed is {self.seed}; it must be from -2^63 to 2^64 - 1")
        if self.data == "":
            raise ValueError("--data is empty; give text, .jsonl or .bin files, or leave it out")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}; choose {', '.join(DTYPES)}")
        if self.order not in ORDERS:
            raise ValueError(f"--order is {self.order!r}; choose {' or '.join(ORDERS)}")
        if self.compile_graph and self.recompute:
            raise ValueError("--compile-graph and --recompute exclude each other; drop one")

        for name in self.logs:
            if name not in LOGS:
                raise ValueError(f"--log is {name!r}; choose among {', '.join(LOGS)}, several by commas")
        if self.init_from is not None and (sizes := self._sizes()):
            flag = "--" + next(iter(sizes)).replace("_", "-")
            raise ValueError(f"{flag} and --init-from exclude each other: the weights have their size; drop one")

    def check_rates(self) -> TrainConfig:
        """Raises ValueError, one line, where the rate would rise, as it may in a run that an earlier version began."""
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(
                f"--min-lr is {self.min_lr} and --lr {self.lr}, so the rate would rise; give a --min-lr of at most --lr"
            )
        return self

    @property
    def logs(self) -> tuple[str, ...]:
        """Where the numbers of a step go."""
        return tuple(dict.fromkeys(name.strip() for name in self.log.split(",")))

    def _sizes(self) -> dict[str, int]:
        return {name: value for name in SIZES if (value := getattr(self, name)) is not None}

    def fresh_model(self, **more) -> GPT2Config:
        """The model that a run without --init-from begins with. more: other fields of its config.

        Raises ValueError, one line, for an unknown preset or an invalid size.
        """
        return GPT2Config.from_preset(self.model, **self._sizes(), **more)

    def for_context(self, context: int) -> TrainConfig:
        """These options for sequences of `context` tokens: --max-tokens as steps, the last of which may pass it."""
        if self.max_tokens is None:
            return self
        tokens = self.grad_accum * self.batch_size * context
        return dataclasses.replace(self, steps=-(-self.max_tokens // tokens), max_tokens=None)

    def learning_rate(self, step: int) -> float:
        """Linear warmup, then a cosine from lr to min_lr, or a tenth of lr, over the rest of the steps."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        least = self.lr / 10 if self.min_lr is None else self.min_lr
        return least + 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) * (self.lr - least)
