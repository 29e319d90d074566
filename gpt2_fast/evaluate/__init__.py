"""How good a model is.

losses  perplexity by strided windows, the loss of token data, log-likelihoods of continuations
tasks   `gpt2-fast eval`: texts, token shards, HellaSwag and LAMBADA from local files
"""

from __future__ import annotations

from gpt2_fast.lazy import exports

_NAMES = {
    "losses": ("Measures", "dataset_loss", "loglikelihoods", "perplexity"),
    "tasks": ("evaluate_files", "hellaswag", "lambada", "load_model"),
}
__getattr__, __dir__, __all__ = exports(__name__, _NAMES)
