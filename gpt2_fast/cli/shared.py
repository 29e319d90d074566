"""What several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

OFFLINE = "without a network, give a checkpoint folder: gpt2-fast train --model nano makes one, in runs/"
IMPLEMENTATIONS = ("auto", "reference", "cpp", "triton")


def choice(words: Iterable[str]) -> str:
    """Words as argparse's usage shows what can be chosen."""
    return "{" + ",".join(words) + "}"


def refuse_without(arguments: argparse.Namespace, options: Iterable[str], needed: str) -> None:
    """Raises ValueError for an option that was given and would be without effect. needed: what it goes with."""
    for name in options:
        value = getattr(arguments, name)
        if value is not None and value is not False:  # 0 is a value
            raise ValueError(f"--{name.replace('_', '-')} goes with {needed}; add that, or drop it")


def check_published(model: str) -> None:
    """Refuses the one preset that is no repository on the hub, before it is looked for there."""
    if model == "nano" and not os.path.isdir(model):
        raise ValueError("nano is a preset without published weights; train one, then give its checkpoint folder")


def as_text(argument: str, name: str) -> str:
    """An argument that is text and not the name of a file: its bytes as UTF-8, in every locale.

    Python decodes arguments by the locale, and keeps what does not fit as surrogates, which no tokenizer knows.
    Raises ValueError, one line with `name`, where the bytes are no UTF-8.
    """
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start})") from None
    except UnicodeEncodeError as error:  # no argument of a process: of a caller in Python
        if "\ud800" <= error.object[error.start] <= "\udfff":
            raise ValueError(f"{name} has {error.object[error.start]!r}, which is no character") from None
        return argument
