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
from yaml import SafeLoader

from gpt2_fast.files import atomic_write
from gpt2_fast.train.config import OTHER_NAMES, TrainConfig

MOST_BYTES = 1 << 20
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text; put it in quotes"}


class _Loader(SafeLoader):
    """Plain mappings and decimal numbers: YAML 1.1 would read 1:30 as 90, 010 as 8 and 1e-3 as text."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
        for first, forms in SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise _Twice(twice[0])
        return super().construct_mapping(node, deep)


class _Twice(Exception):
    """A key of a mapping is written more than once."""


# .inf, too: what the run's own file has where --grad-clip is inf.
_WHOLE, _FRACTION = r"[-+]?(?:0|[1-9][0-9]*)", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"^{_WHOLE}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"^(?:{_FRACTION}|[-+]?\.inf)$"), list("-+.0123456789")
)


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
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)  # of what has no size, too
        if len(text) > MOST_BYTES:
            raise ValueError("it has more than a megabyte")
        data = _Loader(text.decode("utf-8-sig")).get_single_data()
    except OSError as error:
        raise type(error)(f"--config {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except _Twice as error:
        raise ValueError(f"{path} has {error} twice; remove one") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line} is not YAML: {error.problem or 'cannot be read'}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {(str(error).splitlines() or [''])[0]}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {'nothing' if data is None else 'no options'}; write lines such as: steps: 300")
    return from_mapping(data, path)


def from_mapping(data: dict[Any, Any], path: Path) -> dict[str, Any]:
    """Options of their fields' types; what is null is not given. Raises ValueError, one line that names `path`."""
    fields, options = kinds(), {}
    for key, value in data.items():
        if key not in fields:
            word = str(key).replace("-", "_")
            near = [OTHER_NAMES[word]] if word in OTHER_NAMES else difflib.get_close_matches(word, fields, 1, 0.5)
            near = near if isinstance(key, str) else []
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
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
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
