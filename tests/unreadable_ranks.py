"""`gpt2-fast` for parallel.Forks, where the second rank cannot read the batch of step 4.

With a file `full` in its folder the disk of the first rank has no room.
"""

from __future__ import annotations

import os
from pathlib import Path

import training_ranks  # noqa: F401

from gpt2_fast import cli
from gpt2_fast.data.batches import TokenDataset
from gpt2_fast.train import checkpoints

read = TokenDataset.batch


def batch(self, step, *args, **options):
    if step == 4 and os.environ["RANK"] == "1":
        raise OSError("the disk is on fire")
    return read(self, step, *args, **options)


def no_room(*_, **state):
    raise OSError("no room for a checkpoint")


def main(argv: list[str]) -> int:
    TokenDataset.batch = batch
    if Path("full").exists():
        checkpoints.save_checkpoint = no_room
    return cli.main(argv)
