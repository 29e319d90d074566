"""`gpt2-fast` for parallel.Forks, where the second rank cannot read the batch of step 4."""

from __future__ import annotations

import os

import training_ranks  # noqa: F401

from gpt2_fast import cli
from gpt2_fast.data.batches import TokenDataset

read = TokenDataset.batch


def batch(self, step, *args, **options):
    if step == 4 and os.environ["RANK"] == "1":
        raise OSError("the disk is on fire")
    return read(self, step, *args, **options)


def main(argv: list[str]) -> int:
    TokenDataset.batch = batch
    return cli.main(argv)
