"""`gpt2-fast train --dry-run`: what a run takes of memory and time, and no file written.

Memory is by arithmetic, and a run that does not fit is refused before anything is built. Time is measured: a few steps
of the real model on random tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from gpt2_fast import checkpoint
from gpt2_fast.config import GPT2Config, num_params
from gpt2_fast.data.corpus import expand
from gpt2_fast.generate.vocabulary import vocabulary_of
from gpt2_fast.ops.runtime.memory import retain_memory
from gpt2_fast.parallel.group import environment_world
from gpt2_fast.report.machine import resolve_device
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.memory import check_fits, free_bytes, gigabytes, predict_run
from gpt2_fast.train.processes import check_dtype
from gpt2_fast.train.step import Step, build_model, build_optimizer

MEASURED = 3  # steps, after the first
ENOUGH = 30.0  # seconds after which no further step is measured


def estimate_run(config: TrainConfig) -> None:
    """Prints model, memory, tokens and time of a run. Raises ValueError, one line, where it does not fit."""
    if environment_world() > 1:
        raise ValueError("--dry-run measures one process; run it without torchrun")
    device = resolve_device(config.device)
    check_dtype(config, device)
    if config.data is not None:
        expand(config.data)  # or says that there is no such file
    model_config = config_of(config)
    config = config.for_context(config.context or model_config.n_positions)
    free = free_bytes(device)
    for line in plan_lines(config, model_config, device, free):
        print(line, flush=True)
    check_fits(config, model_config, device)
    context = config.context or model_config.n_positions
    tokens = config.grad_accum * config.batch_size * context
    for line in _times(config.steps, tokens, measure(config, device)):
        print(line)


def config_of(config: TrainConfig) -> GPT2Config:
    """The model that a new run trains: of --init-from or --model, with nothing built."""
    if config.init_from is not None:
        return checkpoint.load(config.init_from).config
    return config.fresh_model(**vocabulary_of(config.data))


def plan_lines(
    config: TrainConfig, model_config: GPT2Config, device: torch.device, free: int | None, world: int = 1
) -> Iterator[str]:
    """Parameters, tokens and memory, by arithmetic. world: processes of a run; memory is that of each."""
    c, context = model_config, config.context or model_config.n_positions
    tokens = config.grad_accum * config.batch_size * context
    yield (
        f"{config.init_from or config.model}: {num_params(c):,} parameters ({c.n_layer} layers, {c.n_head} heads, "
        f"{c.n_embd} channels, {c.vocab_size} tokens, {c.n_positions} positions), {config.dtype} on {device}"
    )
    yield (
        f"{tokens:,} tokens a step (--batch-size {config.batch_size}, --context {context}, --grad-accum "
        f"{config.grad_accum}), {tokens * config.steps:,} in {config.steps:,} steps"
    )
    yield ""
    yield "Memory, by arithmetic"
    rows = list(predict_run(config, model_config, device.type, world).rows())
    rows += [] if free is None else [("free here", free)]
    for name, size in rows:
        yield f"  {name:<48}{gigabytes(size):>12}"


def measure(config: TrainConfig, device: torch.device) -> list[float]:
    """Seconds of each of a few steps of the run's model on random tokens, after a first one."""
    if device.type == "cpu":
        retain_memory()
    model = build_model(config, device).train()
    context = config.context or model.config.n_positions
    step = Step(model, build_optimizer(model, config), config, context)
    shape = (config.grad_accum, config.batch_size, context)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0), device="cpu")
    seconds, begun = [], time.perf_counter()
    first = 4 if config.compile_graph else 1  # the fourth captures the graph
    for index in range(first + MEASURED):
        started = time.perf_counter()
        step(tokens, tokens, config.learning_rate(0)).item()  # the loss is there when the step is done
        if index >= first:
            seconds.append(time.perf_counter() - started)
        if seconds and time.perf_counter() - begun > ENOUGH:
            break
    return seconds


def _times(steps: int, tokens: int, seconds: list[float]) -> Iterator[str]:
    """steps: of the run. tokens: of a step."""
    mean = sum(seconds) / len(seconds)
    yield ""
    yield f"Time, measured: {len(seconds)} step{'s' * (len(seconds) > 1)} on random tokens, after a first"
    for name, value in (
        ("seconds a step", f"{mean:,.3f}"),
        ("tokens a second", f"{tokens / mean:,.0f}"),
        ("hours a run", f"{mean * steps / 3600:,.2f}"),
    ):
        yield f"  {name:<48}{value:>12}"
    yield "Validation, samples and checkpoints come on top. Nothing was written."
