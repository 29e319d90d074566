"""`gpt2-fast recipe` and `gpt2-fast fetch`: runs that are written down, and their data."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands) -> None:
    parser = commands.add_parser(
        "recipe", help="write down a whole run: reproduce GPT-2 124M, or a small one",
        description="Writes the configuration of a run and the commands for it. Without NAME, lists the recipes.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", nargs="?", help="gpt2-124m or nano; without it, a list of them")
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: the recipe's name)")
    parser.add_argument("--processes", type=int, default=1, metavar="N",
                        help="processes that torchrun starts, a power of two (default 1)")  # fmt: skip
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="instead of the recipe's")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="sequences a micro-batch (default: the most that fit this device)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="print tokens, memory and hours on this device; write nothing")  # fmt: skip
    parser.set_defaults(run=run)


def add_fetch(commands) -> None:
    parser = commands.add_parser(
        "fetch", help="bring a recipe's data from the Hugging Face hub",
        description="Brings a data set into a folder. What is there stays, and a broken download goes on.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="fineweb10B, fineweb-edu10B or hellaswag")
    parser.add_argument("folder", metavar="FOLDER", help="made where it is missing")
    parser.add_argument("--shards", type=int, metavar="N", help="so many training shards (default: all)")
    parser.set_defaults(run=run_fetch)


def run(arguments: argparse.Namespace) -> int:
    from gpt2_fast import recipes

    if arguments.name is None:
        width = max(map(len, recipes.RECIPES))
        for recipe in recipes.RECIPES.values():
            print(f"{recipe.name:<{width}}  {recipe.title}")
        return 0
    recipe = recipes.get(arguments.name)
    from gpt2_fast.parallel.group import check_world
    from gpt2_fast.report.machine import resolve_device

    device, folder = resolve_device(arguments.device), Path(arguments.out or recipe.name).expanduser()
    more = {} if arguments.dtype is None else {"dtype": arguments.dtype}
    size = arguments.batch_size
    if size is None:
        size = recipes.micro_batch(recipe, device, arguments.processes, **more)
    elif size < 1 or recipe.sequences % size:
        raise ValueError(f"--batch-size is {size}; it must divide the {recipe.sequences} sequences of a step")
    check_world(arguments.processes, recipe.sequences // size)
    config = recipes.config_of(recipe, folder, size, **more)
    if arguments.dry_run:
        for line in recipes.plan(recipe, config, device, arguments.processes):
            print(line, flush=True)
        return 0
    for path in recipes.write(recipe, folder, config, arguments.processes):
        print(path)
    for why, command in recipes.commands(recipe, folder, arguments.processes):
        print(f"# {why}\n{command}")
    return 0


def run_fetch(arguments: argparse.Namespace) -> int:
    from gpt2_fast.data import hub

    hub.fetch(arguments.name, arguments.folder, arguments.shards, say=lambda line: print(line, flush=True))
    return 0
