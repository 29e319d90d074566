"""The programs that `benchmarks train` compares: each makes a model and an optimizer, and one training step.

Run as a module this is the worker: one program in a process of its own, so that no program pays for another's
memory or threads. It prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable

import torch

LEARNING_RATE = 3e-4
ADAMW = {"lr": LEARNING_RATE, "betas": (0.9, 0.95), "weight_decay": 0.1}
SIZES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "smoke": {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512, "n_positions": 64},
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _transformers_model(size: str, attention: str):
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.GPT2Config(**SIZES[size], **NO_DROPOUT, attn_implementation=attention)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def _same_weights(model, size: str):
    """Every program starts from the same weights, so that their losses can be laid side by side."""
    model.load_state_dict(_transformers_model(size, "sdpa").state_dict())
    return model


def _step(model, optimizer, autocast: torch.dtype | None, clip: bool) -> Callable:
    def step(ids: torch.Tensor) -> torch.Tensor:
        cast = torch.autocast(ids.device.type, autocast) if autocast else contextlib.nullcontext()
        with cast:
            loss = model(ids, labels=ids).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def gpt2_fast(size: str, dtype: torch.dtype, device: str, impl: str = "auto") -> Callable:
    """This package: fused AdamW with the clip inside; in bfloat16, float32 master weights in the optimizer."""
    from gpt2_fast import AdamW, GPT2Config, GPT2LMHeadModel, retain_memory

    retain_memory()
    model = _same_weights(GPT2LMHeadModel(GPT2Config(**SIZES[size], **NO_DROPOUT), impl=impl), size)
    model = model.to(device, dtype).train()
    return _step(model, AdamW(model.parameters(), **ADAMW, clip_grad_norm=1.0), None, clip=False)


def reference(size: str, dtype: torch.dtype, device: str) -> Callable:
    """This package's own plain PyTorch reference."""
    return gpt2_fast(size, dtype, device, impl="reference")


def transformers_program(size, dtype, device, attention: str = "sdpa", compiled: bool = False) -> Callable:
    """transformers with torch.optim.AdamW(fused); bfloat16 is autocast, as its users train."""
    model = _transformers_model(size, attention).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True)
    model = torch.compile(model) if compiled else model
    return _step(model, optimizer, None if dtype == torch.float32 else dtype, clip=True)


PROGRAMS: dict[str, Callable] = {
    "gpt2_fast": gpt2_fast,
    "reference": reference,
    "transformers": transformers_program,
    "transformers-eager-attention": lambda *a: transformers_program(*a, attention="eager"),
    "transformers-compile": lambda *a: transformers_program(*a, compiled=True),
}


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, size: str, dtype: str, device: str, batch: int, context: int, warmup: int, steps: int) -> dict:
    """Seconds of each step after `warmup`, the losses of all steps, first-step seconds and peak memory."""
    step = PROGRAMS[name](size, getattr(torch, dtype), device)
    generator = torch.Generator().manual_seed(1)
    vocab_size = SIZES[size].get("vocab_size", 50257)
    seconds, losses = [], []
    for _ in range(warmup + steps):
        ids = torch.randint(0, vocab_size, (batch, context), generator=generator).to(device)
        started = _clock(device)
        losses.append(step(ids))
        seconds.append(_clock(device) - started)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": seconds[warmup:],
        "first_step_seconds": seconds[0],
        "losses": [loss.item() for loss in losses],
        "peak_bytes": peak,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, choices=PROGRAMS)
    for flag in ("--size", "--dtype", "--device"):
        parser.add_argument(flag, required=True)
    for flag in ("--batch", "--context", "--warmup", "--steps"):
        parser.add_argument(flag, type=int, required=True)
    print(json.dumps(measure(**vars(parser.parse_args(argv)))))


if __name__ == "__main__":
    main()
