"""JSON Lines: one object a line, errors that name the file, the line and the field."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

KINDS = {str: "a string", list: "a list"}


def read(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of every line that is not blank; where is "FILE line N".

    Raises ValueError for a line that is not a JSON object, OSError for a file that cannot be read; one line.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    not_text = isinstance(error, UnicodeDecodeError)
                    reason = "not UTF-8" if not_text else getattr(error, "msg", str(error))
                    raise ValueError(f"{where} is not a JSON object ({reason})") from None
                if not isinstance(record, dict):
                    raise ValueError(f"{where} is not a JSON object")
                yield where, record
    except OSError as error:
        raise type(error)(f"cannot read {path} ({error.strerror or error})") from None


def field(record: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """record[name]; ValueError, one line, where it is missing or not of that kind."""
    if name not in record:
        raise ValueError(f"{where} has no {name!r}; it has {', '.join(map(repr, record)) or 'no fields'}")
    if not isinstance(record[name], kind):
        raise ValueError(f"{where}: {name!r} is {record[name]!r:.60}; it must be {KINDS[kind]}")
    return record[name]
