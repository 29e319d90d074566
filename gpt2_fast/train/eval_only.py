"""`gpt2-fast train --eval-only`: the validation loss that a run would print, and no file written."""

from __future__ import annotations

import math

import torch

from gpt2_fast.data import load_data
from gpt2_fast.evaluate import dataset_loss
from gpt2_fast.parallel.group import environment_world
from gpt2_fast.report.machine import resolve_device
from gpt2_fast.train import folder as folders
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.step import build_model


def evaluate_run(options: dict, resume: str | None = None) -> float:
    """Prints and returns the validation loss of --init-from's weights, or of a run's newest checkpoint, on --data.

    It is computed in --dtype on the batches that a run validates on. A run that is being trained is not disturbed: its
    lock is not taken.

    Args:
        options: the fields of TrainConfig that are given.
        resume: a run's folder or one of its checkpoints, whose options count where none is given.

    Raises FileNotFoundError or ValueError, one line.
    """
    if environment_world() > 1:
        raise ValueError("--eval-only is for one process; run it without torchrun")
    state = None
    if resume is not None:
        path = folders.resolve(resume, options)
        if path is None:
            raise FileNotFoundError("--resume auto finds no run; name its folder")
        out = folders.run_of(path)
        state = folders.find_state(path)
        if state is None:
            raise FileNotFoundError(f"{out} holds no checkpoint; there is nothing to evaluate")
        config = folders.options_to_resume(state.extra.get("train_config") or {}, options, out)
    else:
        config = TrainConfig(**options)
        if config.init_from is None:
            raise ValueError("--eval-only needs weights: give --init-from or --resume")
    device = resolve_device(config.device)
    model = build_model(config, device, state and state.config)
    if state is not None:
        model.load_state_dict(state.model)
    model.to(getattr(torch, config.dtype))
    context = config.context or model.config.n_positions
    _, data = load_data(config.data, context=context, vocab_size=model.config.vocab_size)
    size, limit = config.batch_size, config.eval_batches * config.batch_size
    measures = dataset_loss(model, data, batch_size=size, limit=limit, progress=not config.quiet)
    loss = measures["loss"]
    perplexity = f"{measures['perplexity']:.2f}" if math.isfinite(measures["perplexity"]) else "infinite"
    print(f"validation loss: {loss:.4f} (perplexity {perplexity}, {measures['tokens']:,} tokens of {data.name})")
    return loss
