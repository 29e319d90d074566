"""`gpt2-fast convert`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands) -> None:
    parser = commands.add_parser(
        "convert", help="between Hugging Face folders, nanoGPT and llm.c checkpoints",
        description="Converts a checkpoint. The numbers keep their bits, unless --dtype asks for fewer.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", help="folder, hub repository, nanoGPT ckpt.pt or llm.c .bin")
    parser.add_argument("target", metavar="TARGET", help="its name says the format: .pt nanoGPT, .bin llm.c, else hf")
    parser.add_argument("--to", choices=("hf", "nanogpt", "llmc"), help="the format, whatever the name of the target")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="of the weights; bfloat16 rounds float32 ones; without it, as they are")  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from gpt2_fast.checkpoint import convert
    from gpt2_fast.data.characters import CharacterTokenizer
    from gpt2_fast.generate.vocabulary import tokenizer_of

    dtype = None if arguments.dtype is None else convert.DTYPES[arguments.dtype]
    written = convert.convert(arguments.source, arguments.target, to=arguments.to, dtype=dtype)
    print(convert.summary(written, arguments.target))
    tokenizer = None if written.format != "hf" else tokenizer_of(written.config.vocab_size, arguments.source)
    if isinstance(tokenizer, CharacterTokenizer):
        tokenizer.save_pretrained(Path(arguments.target).expanduser(), written.config.n_positions)
        print(f"note: tokenizer.json has its {len(tokenizer.ids)} characters")
    return 0
