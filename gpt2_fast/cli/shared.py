"""What several commands share."""

from __future__ import annotations

import os
from collections.abc import Iterable

OFFLINE = "without a network, give a checkpoint folder: gpt2-fast train --model nano makes one, in runs/"
IMPLEMENTATIONS = ("auto", "reference", "cpp", "triton")


def choice(words: Iterable[str]) -> str:
    """Words as argparse's usage shows what can be chosen."""
    return "{" + ",".join(words) + "}"


def check_published(model: str) -> None:
    """Refuses the one preset that is no repository on the hub, before it is looked for there."""
    if model == "nano" and not os.path.isdir(model):
        raise ValueError("nano is a preset without published weights; train one, then give its checkpoint folder")
