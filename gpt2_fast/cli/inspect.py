"""`gpt2-fast inspect`."""

from __future__ import annotations

import argparse
import os

from gpt2_fast.cli.shared import as_text, check_published, refuse_without


def add(commands) -> None:
    parser = commands.add_parser(
        "inspect", help="what a model is made of, in tables and pictures",
        description="Prints tensors, parameters, memory and FLOPs of a model, or draws one picture of its weights.",
    )  # fmt: skip
    parser.add_argument(
        "model", metavar="MODEL", help="preset (no weights needed), checkpoint folder or hub repository"
    )
    picture = parser.add_mutually_exclusive_group()
    picture.add_argument(
        "--weights",
        metavar="NAME",
        help="draw a tensor: a corner, the whole, its singular values",
    )
    picture.add_argument("--attention", metavar="TEXT", help="draw what each token of a text attends to")
    picture.add_argument("--positions", action="store_true", help="draw the position embedding")
    picture.add_argument("--histograms", action="store_true", help="draw histograms of every layer's matrices")
    parser.add_argument("--layer", type=int, metavar="N", help="with --attention (default 0)")
    parser.add_argument("--head", type=int, metavar="N", help="with --attention (default 0)")
    parser.add_argument("--out", metavar="FILE.png", help="of the picture (default: its kind, in this folder)")
    parser.set_defaults(run=run, offline="gpt2-fast inspect gpt2 prints the tables of a preset without weights")


def run(arguments: argparse.Namespace) -> int:
    from gpt2_fast.checkpoint import load_pretrained
    from gpt2_fast.config import PRESETS, GPT2Config
    from gpt2_fast.report import inspect

    if arguments.attention is not None:
        arguments.attention = as_text(arguments.attention, "--attention")
    else:
        refuse_without(arguments, ("layer", "head"), "--attention")
    kinds = ("weights", "attention", "positions", "histograms")
    kind = next((k for k in kinds if getattr(arguments, k) not in (None, False)), None)
    if kind is None:
        refuse_without(arguments, ("out",), f"a picture: {', '.join('--' + k for k in kinds)}")
        if arguments.model in PRESETS and not os.path.isdir(arguments.model):
            config, weights = GPT2Config.from_preset(arguments.model), None
        else:
            config, weights = load_pretrained(arguments.model)
        print(inspect.report(config, weights, arguments.model))
        return 0
    from gpt2_fast.report.figures import save_figure
    from gpt2_fast.report.measures import weight_measures

    check_published(arguments.model)
    out = arguments.out or f"{kind}.png"
    config, weights = load_pretrained(arguments.model)
    save_figure(_picture(kind, arguments, config, weights), out)
    if kind == "weights":
        print(f"{arguments.weights}: {weight_measures(weights[arguments.weights]).line()}")
    print(out)
    return 0


def _picture(kind: str, arguments: argparse.Namespace, config, weights):
    """The matplotlib Figure of one kind of picture."""
    from gpt2_fast.generate.vocabulary import tokenizer_of
    from gpt2_fast.report import inspect, model_figures

    if kind == "weights":
        if arguments.weights not in weights:
            raise ValueError(f"the model has no tensor {arguments.weights!r}; gpt2-fast inspect MODEL lists them")
        return model_figures.weight_figure(weights[arguments.weights], arguments.weights)
    if kind == "positions":
        return model_figures.positions_figure(weights["transformer.wpe.weight"])
    if kind == "histograms":
        return model_figures.histograms_figure(weights, config.n_layer)
    layer, head = arguments.layer or 0, arguments.head or 0
    if not 0 <= head < config.n_head:
        raise ValueError(f"head is {head}; the model has heads 0 to {config.n_head - 1}")
    tokenizer = tokenizer_of(config.vocab_size, arguments.model)
    if tokenizer is None:
        raise ValueError(f"{arguments.model} has {config.vocab_size} tokens and no tokenizer that is known here")
    ids = tokenizer.encode(arguments.attention)
    pattern = inspect.attention_pattern(config, weights, ids, layer)[head]
    title = f"Attention, layer {layer}, head {head}"
    return model_figures.attention_figure(pattern, inspect.token_labels(tokenizer, ids), title)
