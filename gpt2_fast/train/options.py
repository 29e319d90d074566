"""The options of a run as a YAML file: what --config reads, and the config.yaml in the run's folder.

Its keys are the fields of TrainConfig. A value has its field's type: YAML takes 3e-4, without a point, for text, which
is read as the number here; what it takes for another type than the field's is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from gpt2_fast.files import atomic_write
from gpt2_fast.train.config import TrainConfig

MOST_BYTES = 1 << 20
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text; put it in quotes"}


def kinds() -> dict[str, tuple[type, bool]]:
    """For every field of TrainConfig (its type, whether it may be None)."""
    found = {}
    for name, kind in typing.get_type_hints(TrainConfig).items():
        arguments = typing.get_args(kind)
        own = next((k for k in arguments if k is not type(None)), kind)
        found[name] = own, type(None) in arguments
    return found


def read_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options that a YAML file gives. Raises FileNotFoundError or ValueError, one line that names the file."""
    path = Path(path).expanduser()
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("it has more than a megabyte")
        text = path.read_bytes().decode("utf-8")
        data = yaml.safe_load(text)
    except OSError as error:
        raise type(error)(f"--config {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line} is not YAML: {error.problem or 'cannot be read'}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {(str(error).splitlines() or [''])[0]}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {'nothing' if data is None else 'no options'}; write lines such as: steps: 300")
    written = re.findall(r"^[\"']?(\w+)[\"']?\s*:", text, re.M)
    if twice := [key for key in written if written.count(key) > 1]:
        raise ValueError(f"{path} has {twice[0]} twice; remove one")
    return from_mapping(data, path)


def from_mapping(data: dict[Any, Any], path: Path) -> dict[str, Any]:
    """Options of their fields' types; what is null is not given. Raises ValueError, one line that names `path`."""
    fields, options = kinds(), {}
    for key, value in data.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key).replace("-", "_"), fields, 1, 0.5) if isinstance(key, str) else []
            named = repr(key) if isinstance(key, (str, int, float, bool, type(None))) else "a key that is no word"
            hint = f"did you mean {near[0]}?" if near else "gpt2-fast train --help lists all, with _ in place of -"
            raise ValueError(f"{path}: {named} is no option of train; {hint}")
        if key == "log" and isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = ",".join(value)
        kind, optional = fields[key]
        if value is None and optional:
            continue
        options[key] = _typed(key, value, kind, path)
    if {"steps", "max_tokens"} <= options.keys():
        raise ValueError(f"{path} has steps and max_tokens, which exclude each other; drop one")
    return options


def _typed(key: str, value: Any, kind: type, path: Path) -> Any:
    if type(value) is kind:
        return value
    if (kind is float and type(value) in (int, str)) or (kind is int and type(value) in (float, str)):
        try:
            number = float(value)
            if kind is float or number == int(number):
                return kind(number)
        except (ValueError, OverflowError):
            pass
    shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    raise ValueError(f"{path}: {key} is {shown:.80}; it must be {KINDS[kind]}")


def merged(file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options of a file and of the command line, which wins."""
    excluded = {"steps": "max_tokens", "max_tokens": "steps"}
    dropped = {excluded[name] for name in given if name in excluded}
    return {**{name: value for name, value in file.items() if name not in dropped}, **given}


def write_options(path: Path, config: TrainConfig) -> None:
    """All options, as they are used: --config starts the same run from them."""
    head = f"# gpt2-fast train --config {path.name} --out ANOTHER starts this run again\n"
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    with atomic_write(path) as temporary:
        temporary.write_text(head + text, encoding="utf-8")
