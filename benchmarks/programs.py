"""The programs that `benchmarks train` compares: each makes a model and an optimizer, and one training step of them.

Run as a module this is the worker: one program in a process of its own, so that no program pays for another's
memory or threads. It prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.measure import clock, peak_bytes
from benchmarks.peers import nanogpt
from gpt2_fast import GPT2Config, GPT2LMHeadModel, retain_memory
from gpt2_fast import train as training
from gpt2_fast.train.config import TrainConfig

# The rate at which one batch, learnt again and again, has a loss that falls evenly: a larger one magnifies rounding.
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 3e-5, (0.9, 0.95), 0.1, 1.0
SIZES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    # nanoGPT's README trains this on a CPU, with a batch of 12 and a context of 64.
    "nanogpt-char": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 65, "n_positions": 64},
    "smoke": {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512, "n_positions": 64},
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
Step = Callable[[Tensor, Tensor], Tensor]  # (ids [B, T], targets [B, T]) -> loss, still on the device


@dataclass(frozen=True)
class Setting:
    """What is trained, and in which numbers: the same for every program of a table."""

    model: str
    dtype: torch.dtype
    device: str
    batch_size: int
    context: int

    @property
    def autocast(self) -> contextlib.AbstractContextManager:
        """How peers train in bfloat16: float32 weights, products in autocast's dtype."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)


def _initial_state(setting: Setting) -> dict[str, Tensor]:
    """The weights that every program starts from, so that losses can be laid side by side."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES[setting.model])).state_dict()


def _gpt2_fast(setting: Setting, *, impl: str = "auto", graph: bool = False) -> Step:
    """The step of `gpt2-fast train`; in bfloat16 the optimizer casts the model and keeps its float32 weights."""
    retain_memory()
    model = GPT2LMHeadModel(GPT2Config(**SIZES[setting.model], **NO_DROPOUT), impl=impl)
    model.load_state_dict(_initial_state(setting))
    model = model.to(setting.device).train()
    config = TrainConfig(
        batch_size=setting.batch_size, dtype=str(setting.dtype).removeprefix("torch."), compile_graph=graph,
        lr=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], weight_decay=WEIGHT_DECAY, grad_clip=CLIP,
    )  # fmt: skip
    step = training.Step(model, training.build_optimizer(model, config), config, setting.context)
    return lambda ids, targets: step(ids[None], targets[None], LEARNING_RATE)


def _peer(
    setting: Setting, model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], compiled: bool
) -> Step:
    """A peer's step: torch.optim.AdamW(fused), clip_grad_norm_, bfloat16 by autocast, torch.compile of the model."""
    model = model.to(setting.device).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    run = torch.compile(model) if compiled else model

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        with setting.autocast:
            value = loss(run, ids, targets)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def _transformers(setting: Setting, attention: str = "sdpa", compiled: bool = False) -> Step:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.GPT2Config(**SIZES[setting.model], **NO_DROPOUT, attn_implementation=attention)
    model = transformers.GPT2LMHeadModel(config)
    model.load_state_dict(_initial_state(setting))
    return _peer(setting, model, lambda run, ids, targets: run(ids, labels=ids, shift_labels=targets).loss, compiled)


def _transformers_missing(device: str) -> str | None:
    return (
        None if importlib.util.find_spec("transformers") else "transformers is not installed; pip install transformers"
    )


def _nanogpt(setting: Setting, compiled: bool = False, **parts: Callable) -> Step:
    model = nanogpt.NanoGPT(**SIZES[setting.model], **parts).load_gpt2(_initial_state(setting))
    return _peer(setting, model, lambda run, ids, targets: run(ids, targets), compiled)


def _needs_gpu(device: str) -> str | None:
    return None if device == "cuda" else "a CUDA graph needs a GPU"


@dataclass(frozen=True)
class Program:
    """build(setting) makes the step; missing(device) says why it cannot run there, or None."""

    build: Callable[[Setting], Step]
    missing: Callable[[str], str | None] = lambda device: None


PROGRAMS: dict[str, Program] = {
    "gpt2_fast": Program(_gpt2_fast),
    "gpt2_fast-graph": Program(lambda s: _gpt2_fast(s, graph=True), _needs_gpu),
    "reference": Program(lambda s: _gpt2_fast(s, impl="reference")),
    "transformers": Program(_transformers, _transformers_missing),
    "transformers-eager-attention": Program(lambda s: _transformers(s, attention="eager"), _transformers_missing),
    "transformers-compile": Program(lambda s: _transformers(s, compiled=True), _transformers_missing),
    "nanogpt": Program(_nanogpt),
    "nanogpt-compile": Program(lambda s: _nanogpt(s, compiled=True)),
    "nanogpt-linear-cross-entropy": Program(
        lambda s: _nanogpt(s, loss=nanogpt.torch_linear_cross_entropy()), nanogpt.torch_linear_cross_entropy_missing
    ),
    "nanogpt-liger": Program(lambda s: _nanogpt(s, **nanogpt.liger_parts()), nanogpt.liger_missing),
}


def batch(setting: Setting) -> tuple[Tensor, Tensor]:
    """Ids and targets [B, T] on the device: one batch for every step, so that the loss falls and errors show."""
    generator = torch.Generator().manual_seed(1)
    vocab_size = SIZES[setting.model].get("vocab_size", 50257)
    tokens = torch.randint(0, vocab_size, (setting.batch_size, setting.context + 1), generator=generator)
    return tokens[:, :-1].contiguous().to(setting.device), tokens[:, 1:].contiguous().to(setting.device)


LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


def launches(run: Callable[[], object], device: str) -> int:
    """What the host sends to the device in one call of `run`: kernels, copies, graphs. On a CPU: calls of ops."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run()
        clock(device)
    return sum(_counted(event.key, device) * event.count for event in profile.key_averages())


def _counted(name: str, device: str) -> bool:
    return name.startswith(LAUNCHES if device == "cuda" else ("aten::", "gpt2_fast::"))


def measure(name: str, setting: Setting, warmup: int, steps: int, count_launches: bool) -> dict:
    """Seconds of each step after `warmup`, the losses of all steps, first-step seconds, peak memory, launches."""
    step = PROGRAMS[name].build(setting)
    ids, targets = batch(setting)
    seconds, losses = [], []
    for _ in range(warmup + steps):
        started = clock(setting.device)
        losses.append(step(ids, targets))
        seconds.append(clock(setting.device) - started)
    return {
        "seconds": seconds[warmup:],
        "first_step_seconds": seconds[0],
        "losses": [loss.item() for loss in losses],
        "peak_bytes": peak_bytes(setting.device),
        "launches": launches(lambda: step(ids, targets), setting.device) if count_launches else None,
    }


def product_peak(dtypes: Iterable[torch.dtype], device: str, edge: int) -> float:
    """FLOPs a second of the fastest large product in any of `dtypes`, which is what an MFU is of on a CPU."""
    from benchmarks.ops.harness import product_rate

    return max(product_rate(edge, dtype, device) for dtype in dtypes)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", choices=(*PROGRAMS, "product-peak"), required=True)
    for flag in ("--model", "--dtype", "--device"):
        parser.add_argument(flag, required=True)
    for flag in ("--batch-size", "--context", "--warmup", "--steps"):
        parser.add_argument(flag, type=int, required=True)
    parser.add_argument("--count-launches", action="store_true")
    given = parser.parse_args(argv)
    setting = Setting(given.model, getattr(torch, given.dtype), given.device, given.batch_size, given.context)
    if given.name == "product-peak":
        # A step in bfloat16 may do its products in float32 where those are faster.
        edge = 128 if given.model == "smoke" else 2048 if given.device == "cpu" else 8192
        dtypes = {setting.dtype} if given.device == "cuda" else {setting.dtype, torch.float32}
        result = {"flops_per_second": product_peak(dtypes, given.device, edge), "edge": edge}
    else:
        result = measure(given.name, setting, given.warmup, given.steps, given.count_launches)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
