"""The command `gpt2-fast`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import typing

# torch is imported by the commands, not here: --help and a mistyped option answer at once.

DESCRIPTION = "GPT-2 training and generation through fused kernels, exact to Hugging Face's GPT-2."

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
    "dtype": "float32 or bfloat16 (AdamW then keeps float32 master weights)",
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


def _add_train(commands) -> None:
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
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
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


def _add_generate(commands) -> None:
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
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    import torch

    from gpt2_fast.data.tokenizer import get_tokenizer
    from gpt2_fast.generate import complete
    from gpt2_fast.generate.sampling import Sampling, check_seed
    from gpt2_fast.model import GPT2LMHeadModel
    from gpt2_fast.report.machine import resolve_device

    _check_published(arguments.model)
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


def _check_published(model: str) -> None:
    """Refuses the one preset that is no repository on the hub, before it is looked for there."""
    if model == "nano" and not os.path.isdir(model):
        raise ValueError("nano is a preset without published weights; train one, then give its checkpoint folder")


EVAL_FILES = {
    "text": "perplexity of a UTF-8 text by strided windows, as transformers documents it",
    "hellaswag": "accuracy on hellaswag_val.jsonl, by llm.c's convention and lm-evaluation-harness's",
    "lambada": "last-word accuracy and perplexity on OpenAI's lambada_test.jsonl",
    "shard": "loss of token data: nanoGPT or llm.c .bin, a folder or a quoted pattern of them",
}


def _add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval", help="perplexity, HellaSwag, LAMBADA, loss of token data",
        description="Evaluates a model on local files; several kinds in one call.",
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint folder, hub repository, nanoGPT ckpt.pt or llm.c .bin")
    for task, text in EVAL_FILES.items():
        add(f"--{task}", metavar="FILE", help=text)
    add("--context", type=int, metavar="N", help="tokens a window of --text and --shard (default n_positions)")
    add("--stride", type=int, metavar="N", help="tokens between the windows of --text (default half the context)")
    add("--batch-size", type=int, default=8, metavar="N", help="windows or texts at a time (default 8)")
    add("--limit", type=int, metavar="N", help="at most N windows or examples of each file")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--impl", default="auto", metavar="NAME", help="auto, reference, cpp or triton (default auto)")
    add("--json", metavar="FILE", help="write the results there too")
    parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    import torch

    from gpt2_fast.evaluate import tasks
    from gpt2_fast.report.machine import resolve_device

    files = {task: path for task in EVAL_FILES if (path := getattr(arguments, task)) is not None}
    if not files:
        raise ValueError(f"eval needs a file: {', '.join('--' + task for task in EVAL_FILES)}")
    tasks.check_options(files, arguments.batch_size, arguments.limit)
    _check_published(arguments.model)
    device, dtype = resolve_device(arguments.device), getattr(torch, arguments.dtype)
    model = tasks.load_model(arguments.model, dtype=dtype, device=device, impl=arguments.impl)
    head = {"model": arguments.model, "dtype": arguments.dtype, "device": str(device)}
    results = []
    for result in tasks.evaluate_files(
        model, files, stride=arguments.stride, context=arguments.context, batch_size=arguments.batch_size,
        limit=arguments.limit,
    ):  # fmt: skip
        print(tasks.table([result]), flush=True)
        results.append(result)
    if arguments.json is not None:
        tasks.write_json(arguments.json, {**head, "results": results})
    return 0


def _add_inspect(commands) -> None:
    parser = commands.add_parser(
        "inspect", help="what a model is made of, in tables and pictures",
        description="Prints tensors, parameters, memory and FLOPs of a model, or draws one picture of its weights.",
    )  # fmt: skip
    parser.add_argument(
        "model", metavar="MODEL", help="preset (no weights needed), checkpoint folder or hub repository"
    )
    picture = parser.add_mutually_exclusive_group()
    picture.add_argument("--weights", metavar="NAME", help="draw a tensor, its first 300 rows and columns")
    picture.add_argument("--attention", metavar="TEXT", help="draw what each token of a text attends to")
    picture.add_argument("--positions", action="store_true", help="draw the position embedding")
    picture.add_argument("--histograms", action="store_true", help="draw histograms of every layer's matrices")
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="with --attention (default 0)")
    parser.add_argument("--head", type=int, default=0, metavar="N", help="with --attention (default 0)")
    parser.add_argument("--out", metavar="FILE.png", help="of the picture (default: its kind, in this folder)")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from gpt2_fast.checkpoint import load_pretrained
    from gpt2_fast.config import PRESETS, GPT2Config
    from gpt2_fast.report import inspect

    kinds = ("weights", "attention", "positions", "histograms")
    kind = next((k for k in kinds if getattr(arguments, k) not in (None, False)), None)
    if kind is None:
        if arguments.model in PRESETS and not os.path.isdir(arguments.model):
            config, weights = GPT2Config.from_preset(arguments.model), None
        else:
            config, weights = load_pretrained(arguments.model)
        print(inspect.report(config, weights, arguments.model))
        return 0
    from gpt2_fast.report.figures import save_figure

    _check_published(arguments.model)
    out = arguments.out or f"{kind}.png"
    save_figure(_picture(kind, arguments, *load_pretrained(arguments.model)), out)
    print(out)
    return 0


def _picture(kind: str, arguments: argparse.Namespace, config, weights):
    """The matplotlib Figure of one kind of picture."""
    from gpt2_fast.data.tokenizer import get_tokenizer
    from gpt2_fast.report import inspect, model_figures

    if kind == "weights":
        if arguments.weights not in weights:
            raise ValueError(f"the model has no tensor {arguments.weights!r}; gpt2-fast inspect MODEL lists them")
        return model_figures.weight_figure(weights[arguments.weights], arguments.weights)
    if kind == "positions":
        return model_figures.positions_figure(weights["transformer.wpe.weight"])
    if kind == "histograms":
        return model_figures.histograms_figure(weights, config.n_layer)
    if not 0 <= arguments.head < config.n_head:
        raise ValueError(f"head is {arguments.head}; the model has heads 0 to {config.n_head - 1}")
    tokenizer = get_tokenizer()
    ids = tokenizer.encode(arguments.attention)
    pattern = inspect.attention_pattern(config, weights, ids, arguments.layer)[arguments.head]
    title = f"Attention, layer {arguments.layer}, head {arguments.head}"
    return model_figures.attention_figure(pattern, inspect.token_labels(tokenizer, ids), title)


def _add_doctor(commands) -> None:
    parser = commands.add_parser(
        "doctor", help="what runs on this machine, and why", description="Machine, versions, and op by op what runs."
    )
    parser.add_argument("--patch", metavar="MODEL",
                        help="what gpt2_fast.patch takes over of a transformers checkpoint, and what not")  # fmt: skip
    parser.add_argument("--kernels", action="store_true",
                        help="compile every Triton kernel for every card that is supported; needs no GPU")  # fmt: skip
    parser.add_argument("--arch", action="append", metavar="A,B",
                        help="with --kernels: these targets alone, as in 86,gfx942 (may be repeated)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="with --kernels: one configuration of each kernel")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from gpt2_fast.report import doctor

    if arguments.patch is not None:
        print(doctor.explain_patch_of(arguments.patch))
        return 0
    if not arguments.kernels:
        doctor.report()
        return 0
    from gpt2_fast.kernels import cards

    names = [name for given in arguments.arch or () for name in given.split(",")]
    archs = tuple(dict.fromkeys(map(cards.named, names))) or tuple(cards.ARCHS)
    return 1 if doctor.check_kernels(archs, arguments.quick) else 0


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert", help="between Hugging Face folders, nanoGPT and llm.c checkpoints",
        description="Converts a checkpoint. The numbers keep their bits, unless --dtype asks for fewer.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", help="folder, hub repository, nanoGPT ckpt.pt or llm.c .bin")
    parser.add_argument("target", metavar="TARGET", help="its name says the format: .pt nanoGPT, .bin llm.c, else hf")
    parser.add_argument("--to", choices=("hf", "nanogpt", "llmc"), help="the format, whatever the name of the target")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="of the weights; bfloat16 rounds float32 ones; without it, as they are")  # fmt: skip
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from gpt2_fast.checkpoint import convert

    dtype = None if arguments.dtype is None else convert.DTYPES[arguments.dtype]
    written = convert.convert(arguments.source, arguments.target, to=arguments.to, dtype=dtype)
    print(convert.summary(written, arguments.target))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line, whole."""
    top = argparse.ArgumentParser(prog="gpt2-fast", description=DESCRIPTION)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_generate(commands)
    _add_eval(commands)
    _add_inspect(commands)
    _add_doctor(commands)
    _add_convert(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command. An error is one line on stderr and status 2; GPT2_FAST_DEBUG=1 shows where it arose."""
    # Of several processes the first says what is wrong with their options.
    with contextlib.redirect_stderr(sys.stderr if _is_first() else io.StringIO()):
        arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, IndexError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("GPT2_FAST_DEBUG"):
            raise
        return _fail(error)
    except KeyboardInterrupt:
        return 130


def _is_first() -> bool:
    """Whether this process speaks before any have joined. So does one whose variables name no place among several."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not (rank.isdecimal() and world.isdecimal() and 0 < int(rank) < int(world))


def _fail(error: Exception) -> int:
    """One line. Of several processes the first that fails says it, and none waits for the others."""
    group = sys.modules["gpt2_fast.parallel.group"].current() if "gpt2_fast.parallel.group" in sys.modules else None
    speaks = _is_first() if group is None else group.speaks()
    if speaks:
        print(f"gpt2-fast: {error}", file=sys.stderr, flush=True)
    if group is not None and group.world > 1:
        sys.stdout.flush()
        os._exit(2)  # the interpreter's own end would wait for what the processes send each other
    return 2


if __name__ == "__main__":
    sys.exit(main())
