"""`gpt2-fast generate`."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from pathlib import Path

from gpt2_fast.cli.shared import IMPLEMENTATIONS, OFFLINE, as_text, check_published, choice


def add(commands) -> None:
    parser = commands.add_parser(
        "generate", help="continue a text", description="Continues a text; one sample appears as its tokens come."
    )
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?",
        help="text to continue; - or nothing reads what is piped in; nothing on a terminal begins a text")  # fmt: skip
    add("--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file; - is what is piped in")
    add("--json", action="store_true", help="print one JSON object a sample, in a line, and nothing else")
    add(
        "--model",
        metavar="MODEL",
        default="gpt2",
        help="checkpoint folder, hub repository, nanoGPT ckpt.pt or llm.c .bin (default gpt2)",
    )
    add("--num-samples", type=int, default=1, metavar="N", help="samples, as one batch (default 1)")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="most tokens a sample (default 100)")
    add("--seed", type=int, metavar="N", help="of the sampling; without it, every run differs")
    add("--temperature", type=float, default=1.0, metavar="X", help="0 takes the most likely token (default 1)")
    add("--top-k", type=int, default=50, metavar="N", help="sample among the N most likely; 0: all (default 50)")
    add("--top-p", type=float, metavar="P", help="sample among the fewest tokens whose probabilities reach P")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less (default 1)")
    add("--stop", action="append", default=[], metavar="STRING", help="end before this string (may be repeated)")
    add("--slide", action="store_true", help="past n_positions, go on with the newest half of the text")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    add("--weights", choices=("float32", "bfloat16", "int8", "int4"),
        help="on a CPU, how the weights are stored; int8: one scale a row, int4: one for 32 weights (default: the "
        "model's dtype)")  # fmt: skip
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--impl", default="auto", metavar=choice(IMPLEMENTATIONS), help="of every op which has it (default auto)")
    parser.set_defaults(run=run, offline=OFFLINE)


def read_prompt(arguments: argparse.Namespace) -> str:
    """PROMPT, --prompt-file, or what is piped in, without the newline that ends a file. Raises one line."""
    if arguments.prompt not in (None, "-") or (arguments.prompt is None and arguments.prompt_file):
        if arguments.prompt_file and arguments.prompt:
            raise ValueError("PROMPT and --prompt-file exclude each other; drop one")
        if arguments.prompt_file is None:
            return as_text(arguments.prompt, "PROMPT")
        source = arguments.prompt_file
    elif arguments.prompt_file:
        raise ValueError("PROMPT and --prompt-file exclude each other; drop one")
    elif arguments.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        return ""
    else:
        source = "-"
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
        text = content.decode("utf-8-sig")  # as editors on Windows write it: the mark is no part of a prompt
    except OSError as error:
        raise type(error)(f"cannot read {source} ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        name = "what is piped in" if source == "-" else source
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start})") from None
    return text.removesuffix("\n").removesuffix("\r")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from gpt2_fast.evaluate.tasks import load_model
    from gpt2_fast.generate import completions, tokenizer_of
    from gpt2_fast.generate.sampling import Sampling, check_seed
    from gpt2_fast.report.machine import resolve_device

    check_published(arguments.model)
    if arguments.top_k < 0:
        raise ValueError(f"--top-k is {arguments.top_k}; it must be at least 1, or 0 for all")
    # Before the model is read, which may take a while.
    Sampling(arguments.temperature, arguments.top_k or None, arguments.top_p, arguments.repetition_penalty)
    check_seed(arguments.seed)
    prompt, stop = read_prompt(arguments), [as_text(string, "--stop") for string in arguments.stop]
    device = resolve_device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    model = load_model(arguments.model, dtype=dtype, device=device, impl=arguments.impl)
    tokenizer = tokenizer_of(model.config.vocab_size, arguments.model)
    if tokenizer is None:
        raise ValueError(
            f"{arguments.model} has {model.config.vocab_size} tokens and no tokenizer that is known here; put the "
            "meta.pkl of its data beside it, or give token ids to gpt2_fast.generate.generate"
        )
    if arguments.seed is None:  # what --json prints can be had again, and torch draws no number for every word
        arguments.seed = secrets.randbelow(2**32)
    stream = _Stream(prompt) if arguments.num_samples == 1 and not arguments.json else None
    found = completions(
        model, tokenizer, prompt, arguments.max_new_tokens, num_samples=arguments.num_samples,
        stop=stop, write=stream, temperature=arguments.temperature,
        top_k=arguments.top_k or None, top_p=arguments.top_p, repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed, weights=arguments.weights, context="slide" if arguments.slide else None,
    )  # fmt: skip
    if arguments.json:
        for i, one in enumerate(found, start=1):
            print(json.dumps({
                "sample": i, "prompt": prompt, "text": one.text, "tokens": one.tokens,
                "finish_reason": one.finish_reason, "seed": arguments.seed, "model": arguments.model,
            }))  # fmt: skip
    elif stream is not None:
        print("" if stream.started else prompt)
    else:
        for i, one in enumerate(found, start=1):
            print(f"--- {i} of {len(found)} ---\n{prompt}{one.text}")
    return 0


class _Stream:
    """Prints the prompt and pieces of a text as they come."""

    def __init__(self, prompt: str):
        self._prompt, self.started = prompt, False

    def __call__(self, piece: str) -> None:
        print(piece if self.started else self._prompt + piece, end="", flush=True)
        self.started = True
