"""`gpt2-fast train`."""

from __future__ import annotations

import argparse
import dataclasses
import typing

TRAIN_HELP = {
    "model": "preset: nano, distilgpt2, gpt2, gpt2-medium, gpt2-large or gpt2-xl",
    "init_from": "start from these weights: Hugging Face folder or hub name, nanoGPT ckpt.pt or llm.c .bin",
    "data": "text, jsonl (its text fields), folder of these, nanoGPT or llm.c .bin; without it, Python's own source",
    "order": "random windows of the data, or epoch: every window once an epoch, shuffled",
    "steps": "optimizer steps",
    "batch_size": "sequences a micro-batch",
    "context": "tokens a sequence; without it, the model's n_positions",
    "grad_accum": "micro-batches a step, of all processes together",
    "lr": "highest learning rate",
    "warmup": "steps of linear warmup",
    "min_lr": "learning rate at the end of the cosine",
    "weight_decay": "on matrices and embeddings only",
    "beta1": "AdamW's first decay rate",
    "beta2": "AdamW's second decay rate",
    "dropout": "of embeddings, attention and residuals; without it 0, or as the config of --init-from says",
    "grad_clip": "largest global gradient norm; 0 turns clipping off",
    "dtype": "float32, or bfloat16 or float16 (AdamW then keeps float32 master weights; float16 scales the loss)",
    "device": "auto, cpu, cuda or cuda:N",
    "impl": "auto, or the implementation that every op which has it must use: reference, cpp, triton",
    "seed": "of weights, data and dropout",
    "eval_every": "steps between validations; 0 for the first and last only",
    "eval_batches": "batches a validation",
    "sample_every": "steps between printed samples; 0 for the last only",
    "save_every": "steps between checkpoints; 0: by time and at the end",
    "save_minutes": "minutes between checkpoints; 0: by steps and at the end",
    "keep": "so many of the newest checkpoints stay, and the best by validation loss",
    "verify_every": "steps between those that are computed twice and compared to the bit; 0: none",
    "recompute": "keep only each block's input and compute the rest again in backward: less memory",
    "compile_graph": "replay the step as one CUDA graph",
    "timeout_minutes": "how long a process waits for another one, of several that torchrun started",
    "out": "folder of the run; without it, a new one in runs/",
}


def add(commands) -> None:
    from gpt2_fast.train.config import TrainConfig

    parser = commands.add_parser(
        "train", help="train a GPT-2", description="Trains a GPT-2 and leaves metrics.jsonl, loss.png and checkpoint/."
    )
    types = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        flag, kind = "--" + field.name.replace("_", "-"), types[field.name]
        text = TRAIN_HELP[field.name] + ("" if field.default in (None, False) else f" (default {field.default})")
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            kind = next((k for k in typing.get_args(kind) if k is not type(None)), kind)
            parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text, metavar=kind.__name__.upper())
    parser.add_argument("--resume", metavar="FOLDER", default=None,
                        help="continue the run in this folder, or from this checkpoint, with its options unless given "
                             "again; auto: the run in --out, or the newest in runs/, or a new one")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="print what the run takes of memory and time; write nothing")  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from gpt2_fast.parallel import leave
    from gpt2_fast.train import estimate_run, resume_run, start_run
    from gpt2_fast.train.config import TrainConfig

    given = {k: v for k, v in vars(arguments).items() if k not in ("run", "resume", "command", "dry_run")}
    if arguments.dry_run:
        if arguments.resume is not None:
            raise ValueError("--dry-run and --resume exclude each other; drop one")
        estimate_run(TrainConfig(**given))
        return 0
    run = start_run(given) if arguments.resume is None else resume_run(arguments.resume, given)
    run.train()
    leave()
    return 130 if run.interrupted else 0
