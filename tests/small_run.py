"""Runs that take no time: one layer, 64 tokens, data of numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.checkpoint.run_folder import checkpoints
from gpt2_fast.data.shards import write_bin

VOCAB = 64


def numbers(path: Path, count: int = 4000, seed: int = 0) -> Path:
    """A .bin file of so many ids."""
    write_bin(path, [np.random.default_rng(seed).integers(0, VOCAB, count).astype(np.uint16)])
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with train.bin and val.bin."""
    (tmp_path / "data").mkdir()
    numbers(tmp_path / "data" / "train.bin")
    numbers(tmp_path / "data" / "val.bin", 400, seed=1)
    return tmp_path / "data"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def small(tmp_path, data, out):
    """(**options) -> those of a run in `out`."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, n_positions=32, vocab_size=VOCAB))
    model.save_pretrained(tmp_path / "weights")
    given = {"init_from": str(tmp_path / "weights"), "dropout": 0.0, "data": str(data), "out": str(out), "context": 16}
    given |= {"batch_size": 2, "eval_every": 0, "eval_batches": 2, "warmup": 0, "quiet": True}
    return lambda **more: {**given, "steps": 2, **more}


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]
