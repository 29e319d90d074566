"""`python -m benchmarks quantisation MODEL --text FILE`: what packing weights in bfloat16 or int8 costs in perplexity.

Windows of text are fed to `ops.decode_step` a token at a time, as generation does, so its activations, cache and
arithmetic are in the figure as well. Perplexity is the exponential of the mean loss of all but a window's first token.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_fast import GPT2LMHeadModel, get_tokenizer
from gpt2_fast.generate.decoders import parameters_of
from gpt2_fast.ops.decode_step import PackedCache, PackedModel

WEIGHTS = ("float32", "bfloat16", "int8")


def packed_perplexity(model: GPT2LMHeadModel, windows: Tensor, weights: str) -> float:
    """Perplexity of windows, int64 [B, T], by T - 1 decode steps on weights packed as `weights`."""
    packed = PackedModel(parameters_of(model), weights)
    cache = PackedCache(packed, *windows.shape)
    losses = [
        F.cross_entropy(packed.step(windows[:, t].contiguous(), cache), windows[:, t + 1])
        for t in range(windows.shape[1] - 1)
    ]
    return math.exp(torch.stack(losses).double().mean().item())


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
        perplexities = {weights: packed_perplexity(model, windows, weights) for weights in WEIGHTS}
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    base = perplexities["float32"]
    print(f"{windows.numel() - len(windows):,} tokens scored, {len(windows)} windows of {windows.shape[1]}")
    for weights, value in perplexities.items():
        print(f"{weights:10} {value:12.4f} {value / base - 1:+.4%}")
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "windows": list(windows.shape), **perplexities}) + "\n")
    return 0
