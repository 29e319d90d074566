"""`gpt2-fast` for parallel.Forks: what every rank would read again and what every run would draw is done already."""

from __future__ import annotations

import matplotlib.pyplot  # noqa: F401

import gpt2_fast.train.loop  # noqa: F401
from gpt2_fast.cli import main  # noqa: F401
from gpt2_fast.data.tokenizer import get_tokenizer
from gpt2_fast.report import figures

get_tokenizer()
# Drawing would be a third of so short a run; an empty picture is written in the same way.
figures.loss_figure = lambda records, title="": figures.Picture(figsize=(1, 1))
