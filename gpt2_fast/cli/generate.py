"""`gpt2-fast generate`."""

from __future__ import annotations

import argparse

from gpt2_fast.cli.shared import check_published


def add(commands) -> None:
    parser = commands.add_parser(
        "generate", help="continue a text", description="Continues a text; one sample appears as its tokens come."
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="", help="without it, a text from its start")
    add = parser.add_argument
    add("--model", metavar="MODEL", default="gpt2", help="checkpoint folder or hub repository (default gpt2)")
    add("--num-samples", type=int, default=1, metavar="N", help="samples, as one batch (default 1)")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="most tokens a sample (default 100)")
    add("--seed", type=int, metavar="N", help="of the sampling; without it, every run differs")
    add("--temperature", type=float, default=1.0, metavar="X", help="0 takes the most likely token (default 1)")
    add("--top-k", type=int, default=50, metavar="N", help="sample among the N most likely; 0: all (default 50)")
    add("--top-p", type=float, metavar="P", help="sample among the fewest tokens whose probabilities reach P")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less (default 1)")
    add("--stop", action="append", default=[], metavar="STRING", help="end in front of it (may be repeated)")
    add("--slide", action="store_true", help="past n_positions, go on with the newest half of the text")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    add("--weights", choices=("float32", "bfloat16", "int8"),
        help="on a CPU, pack the weights so; int8: one scale a row (default: the model's dtype)")  # fmt: skip
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--impl", default="auto", metavar="NAME", help="auto, reference, cpp or triton (default auto)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from gpt2_fast.data.tokenizer import get_tokenizer
    from gpt2_fast.generate import complete
    from gpt2_fast.generate.sampling import Sampling, check_seed
    from gpt2_fast.model import GPT2LMHeadModel
    from gpt2_fast.report.machine import resolve_device

    check_published(arguments.model)
    # Before the model is read, which may take a while.
    Sampling(arguments.temperature, arguments.top_k or None, arguments.top_p, arguments.repetition_penalty)
    check_seed(arguments.seed)
    device = resolve_device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    model = GPT2LMHeadModel.from_pretrained(arguments.model, dtype=dtype, device=device, impl=arguments.impl)
    one = arguments.num_samples == 1
    started = False

    def write(piece: str) -> None:
        nonlocal started
        print(piece if started else arguments.prompt + piece, end="", flush=True)
        started = True

    texts = complete(
        model, get_tokenizer(), arguments.prompt, arguments.max_new_tokens, num_samples=arguments.num_samples,
        stop=arguments.stop, write=write if one else None, temperature=arguments.temperature,
        top_k=arguments.top_k or None, top_p=arguments.top_p, repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed, weights=arguments.weights, context="slide" if arguments.slide else None,
    )  # fmt: skip
    if one:
        print("" if started else arguments.prompt)
    else:
        for i, text in enumerate(texts, start=1):
            print(f"--- {i} of {len(texts)} ---\n{arguments.prompt}{text}")
    return 0
