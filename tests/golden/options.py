"""The command line: every option of every subcommand, with its default, type and choices, without its help.

It protects scripts that call `gpt2-fast`. An option that is added, changed or removed changes a line of `options.json`,
which `python -m tests.golden options` remakes from the parser.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FILE = Path(__file__).with_name("options.json")
COMMAND = "python -m tests.golden options"


def _default(command: str, action: argparse.Action):
    """`train` leaves an option that is not given to TrainConfig, whose default it then is."""
    from gpt2_fast.train_config import TrainConfig

    if action.default is argparse.SUPPRESS:
        return getattr(TrainConfig(), action.dest) if command == "train" and hasattr(TrainConfig, action.dest) else None
    return action.default


def options() -> dict[str, dict]:
    """{"command --option": what argparse knows of it}; a positional argument goes by its name in capitals."""
    from gpt2_fast import cli

    top = cli.parser()
    subparsers = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    found = {}
    for command, parser in subparsers.choices.items():
        groups = [[a.dest for a in group._group_actions] for group in parser._mutually_exclusive_groups]
        for action in parser._actions:
            name = " ".join(action.option_strings) or str(action.metavar or action.dest).upper()
            described = {
                "takes": type(action).__name__.strip("_").removesuffix("Action"),
                "type": getattr(action.type, "__name__", None),
                "default": _default(command, action),
                "choices": None if action.choices is None else list(action.choices),
                "nargs": action.nargs,
                "required": action.required or None,
                "excludes": next((sorted({*g} - {action.dest}) for g in groups if action.dest in g), None),
            }
            found[f"{command} {name}"] = {key: value for key, value in described.items() if value is not None}
    return found


def read() -> dict[str, dict]:
    return json.loads(FILE.read_text())


def remake() -> str:
    """Writes the file; says how many options it has."""
    found = options()
    FILE.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n")
    return f"{FILE.name}: {len(found)} options"
