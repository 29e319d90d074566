"""`python -m benchmarks quantisation MODEL --text FILE`: what packing in bfloat16, int8 or int4 costs in perplexity.

Windows of text are fed to `ops.decode_step` a token at a time, as generation does, so its activations, cache and
arithmetic are in the figure as well. Perplexity is the exponential of the mean loss of all but a window's first token.
Rounding moves it either way; the divergence from the float32 model's own distribution only grows.
Beside them stand llama.cpp's Q8_0 and Q4_0, by the gguf package: every matrix rounded so, then the arithmetic of
float32, so that what differs from int8 and int4 is the format's own.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_fast import GPT2LMHeadModel, get_tokenizer
from gpt2_fast.generate.decoders import parameters_of
from gpt2_fast.ops.packed_model import PackedCache, PackedModel

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
PEERS = ("q8_0", "q4_0")


class Cost(NamedTuple):
    """perplexity, and the mean Kullback-Leibler divergence of the next token from the float32 model's, in nats."""

    perplexity: float
    divergence: float


def cost(packed: PackedModel, exact: PackedModel, windows: Tensor) -> Cost:
    """Of windows, int64 [B, T], by T - 1 decode steps of both."""
    caches = [PackedCache(model, *windows.shape) for model in (packed, exact)]
    losses, divergences = [], []
    for t in range(windows.shape[1] - 1):
        tokens = windows[:, t].contiguous()
        logp, expected = (m.step(tokens, c).log_softmax(-1) for m, c in zip((packed, exact), caches, strict=True))
        losses.append(F.nll_loss(logp, windows[:, t + 1]))
        divergences.append(F.kl_div(logp, expected, reduction="batchmean", log_target=True))
    mean = lambda values: torch.stack(values).double().mean().item()
    return Cost(math.exp(mean(losses)), mean(divergences))


@torch.no_grad()
def rounded_as_gguf(model: GPT2LMHeadModel, kind: str) -> GPT2LMHeadModel:
    """A copy whose matrices, positions aside, are what llama.cpp's format `kind` makes of them."""
    from benchmarks.peers import gguf_file

    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "wpe" not in name:
            by_output = parameter if "wte" in name or "lm_head" in name else parameter.t()
            by_output.copy_(torch.from_numpy(gguf_file.rounded(by_output.contiguous().numpy(), kind)))
    return model


def measure(model: GPT2LMHeadModel, windows: Tensor) -> dict[str, Cost]:
    """By format; those of llama.cpp where gguf is installed."""
    exact = PackedModel(parameters_of(model), "float32")
    found = {weights: cost(PackedModel(parameters_of(model), weights), exact, windows) for weights in WEIGHTS}
    for kind in PEERS if importlib.util.find_spec("gguf") else ():
        found[kind] = cost(PackedModel(parameters_of(rounded_as_gguf(model, kind)), "float32"), exact, windows)
    return found


def cut_windows(text: str, context: int, count: int) -> Tensor:
    """`count` windows int64 [B, context], spread evenly over the text's tokens.

    Raises ValueError where the text is shorter than one window.
    """
    ids = torch.tensor(get_tokenizer().encode(text))
    if len(ids) < context:
        raise ValueError(f"--text has {len(ids)} tokens and a window {context}; give more text or a smaller --context")
    count = min(count, len(ids) // context)
    starts = torch.linspace(0, len(ids) - context, count).long()
    return torch.stack([ids[start : start + context] for start in starts.tolist()])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quantisation", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint folder or hub name")
    parser.add_argument("--text", type=Path, required=True, help="text that the model has not seen")
    parser.add_argument("--context", type=int, default=128, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=64, help="at most so many")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args(argv)
    try:
        model = GPT2LMHeadModel.from_pretrained(args.model, dtype=torch.float32)
        windows = cut_windows(args.text.read_text(encoding="utf-8"), args.context, args.windows)
        costs = measure(model, windows)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    base = costs["float32"].perplexity
    print(f"{windows.numel() - len(windows):,} tokens scored, {len(windows)} windows of {windows.shape[1]}")
    print(f"{'':10} {'perplexity':>12} {'':>9} {'divergence from float32':>24}")
    for weights, (perplexity, divergence) in costs.items():
        print(f"{weights:10} {perplexity:12.4f} {perplexity / base - 1:+9.4%} {divergence:24.2e}")
    for kind in PEERS:
        if kind not in costs:
            print(f"not measured: {kind}: gguf is not installed")
    if args.json:
        record = {"model": args.model, "windows": list(windows.shape)}
        record |= {weights: perplexity for weights, (perplexity, _) in costs.items()}
        record["divergence"] = {weights: divergence for weights, (_, divergence) in costs.items()}
        args.json.write_text(json.dumps(record) + "\n")
    return 0
