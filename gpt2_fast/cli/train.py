"""`gpt2-fast train`."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from gpt2_fast.cli.shared import IMPLEMENTATIONS, choice
from gpt2_fast.config import PRESETS
from gpt2_fast.train.config import DTYPES, LOGS, ORDERS, TrainConfig

TRAIN_HELP = {
    "model": "preset, with fresh weights",
    "n_layer": "layers, in place of the preset's",
    "n_head": "heads, in place of the preset's",
    "n_embd": "channels, in place of the preset's",
    "init_from": "start from these weights: Hugging Face folder or hub name, nanoGPT ckpt.pt or llm.c .bin",
    "data": "text, jsonl (its text fields), folder of these, nanoGPT or llm.c .bin; without it, Python's own source",
    "order": "random windows of the data, or epoch: every window once an epoch, shuffled",
    "steps": "optimizer steps",
    "max_tokens": "train on at least this many tokens, in whole steps; instead of --steps",
    "batch_size": "sequences a micro-batch",
    "context": "tokens a sequence; without it, the model's n_positions",
    "grad_accum": "micro-batches a step, of all processes together",
    "lr": "highest learning rate",
    "warmup": "steps of linear warmup",
    "min_lr": "learning rate at the end of the cosine; without it, a tenth of --lr",
    "weight_decay": "on matrices and embeddings only",
    "beta1": "AdamW's first decay rate",
    "beta2": "AdamW's second decay rate",
    "dropout": "of embeddings, attention and residuals; without it 0, or as the config of --init-from says",
    "grad_clip": "largest global gradient norm; 0 turns clipping off",
    "dtype": "of weights and activations; AdamW keeps float32 masters of low-precision ones, float16 scales the loss",
    "device": "auto, cpu, cuda or cuda:N",
    "impl": "implementation of every op that has it; auto picks the best of this machine",
    "seed": "of weights, data and dropout",
    "eval_every": "steps between validations; 0 for the first and last only",
    "eval_batches": "batches a validation",
    "sample_every": "steps between printed samples; 0 for the last only",
    "save_every": "steps between checkpoints; 0: by time and at the end",
    "save_minutes": "minutes between checkpoints; 0: by steps and at the end",
    "keep": "keep this many of the newest checkpoints, and the best by validation loss",
    "verify_every": "steps between those that are computed twice and compared to the bit; 0: none",
    "recompute": "keep only each block's input and compute the rest again in backward: less memory",
    "compile_graph": "replay the step as one CUDA graph",
    "timeout_minutes": "how long a process waits for another one, of several that torchrun started",
    "log": "where losses go besides metrics.jsonl, which is always written; several by commas",
    "log_every": "steps between lines where stderr is no terminal, which shows a bar",
    "quiet": "print only errors and the paths of the results",
    "out": "folder of the run; without it, a new one in runs/",
}


# Words that an option takes, for the usage; TrainConfig says what is wrong with another one.
WORDS = {"model": tuple(PRESETS), "dtype": DTYPES, "order": ORDERS, "impl": IMPLEMENTATIONS, "log": LOGS}
OFFLINE = "without a network, --model gpt2 trains that size from fresh weights, and --init-from takes a folder or file"


def add(commands) -> None:
    parser = commands.add_parser(
        "train", help="train a GPT-2", description="Trains a GPT-2 and leaves metrics.jsonl, loss.png and checkpoint/."
    )
    types, length = typing.get_type_hints(TrainConfig), parser.add_mutually_exclusive_group()
    for field in dataclasses.fields(TrainConfig):
        flag, kind = "--" + field.name.replace("_", "-"), types[field.name]
        shown = field.default is not None and field.default is not False
        text = TRAIN_HELP[field.name] + (f" (default {field.default})" if shown else "")
        options = {"default": argparse.SUPPRESS, "help": text}
        kind = next((k for k in typing.get_args(kind) if k is not type(None)), kind)
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        metavar = choice(WORDS[field.name]) if field.name in WORDS else kind.__name__.upper()
        options |= {"action": "append"} if field.name == "log" else {}
        group = length if field.name in ("steps", "max_tokens") else parser
        group.add_argument(flag, type=whole_number if kind is int else kind, metavar=metavar, **options)
    parser.add_argument("--config", metavar="FILE.yaml",
                        help="options from a file, such as a run's config.yaml; the command line wins")  # fmt: skip
    parser.add_argument("--resume", metavar="FOLDER", default=None,
                        help="continue the run in this folder, or from this checkpoint, with the options it was "
                             "started with; those given here override them. auto: the run in --out, or the newest in "
                             "runs/, or a new one")  # fmt: skip
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true",
                      help="print what the run takes of memory and time; write nothing")  # fmt: skip
    only.add_argument("--eval-only", action="store_true",
                      help="print the validation loss of --init-from or --resume; write nothing")  # fmt: skip
    parser.set_defaults(run=run, offline=OFFLINE)


def whole_number(text: str) -> int:
    """An int as Python writes it, or a float that is one: 1e6."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


whole_number.__name__ = "whole number"  # as argparse names what it refuses


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainConfig that --config and the command line give."""
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {k: v for k, v in vars(arguments).items() if k in fields}
    if {"model", "init_from"} <= given.keys():
        raise ValueError("--model and --init-from exclude each other: the weights say what the model is; drop one")
    if "log" in given:
        given["log"] = ",".join(given["log"])
    if arguments.config is None:
        return given
    from gpt2_fast.train.options import merged, read_options

    return merged(read_options(arguments.config), given)


def run(arguments: argparse.Namespace) -> int:
    from gpt2_fast.parallel import leave
    from gpt2_fast.train import estimate_run, evaluate_run, resume_run, start_run
    from gpt2_fast.train.say import let_go

    given = given_options(arguments)
    if arguments.eval_only:
        evaluate_run(given, arguments.resume)
        return 0
    if arguments.dry_run:
        if arguments.resume is not None:
            raise ValueError("--dry-run and --resume exclude each other; drop one")
        estimate_run(TrainConfig(**given).check_rates())
        return 0
    try:
        run = start_run(given) if arguments.resume is None else resume_run(arguments.resume, given)
        run.train()
        leave()
    finally:
        let_go()
    return 130 if run.interrupted else 0
