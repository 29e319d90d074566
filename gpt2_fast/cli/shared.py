"""What several commands share."""

from __future__ import annotations

import os


def check_published(model: str) -> None:
    """Refuses the one preset that is no repository on the hub, before it is looked for there."""
    if model == "nano" and not os.path.isdir(model):
        raise ValueError("nano is a preset without published weights; train one, then give its checkpoint folder")
