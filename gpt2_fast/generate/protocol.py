"""What generation asks of a model: this package's GPT2LMHeadModel and nanoGPT's GPT both have it.

Generation knows no model by name, so that a model may offer `generate` as a method of its own.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn


class Model(Protocol):
    """An nn.Module that has these.

    config: n_positions and vocab_size; `generate_batch` reads the token ids of a GPT2Config.
    transformer: (tokens int64 [B, T], mask [B, T] or None, position_ids int64 [B, T], cache=) -> hidden [B, T, C];
        `wte.weight` says the model's dtype and device, `h` are its layers, `impl` is what the ops run on.
    lm_head: `weight` [V, C].
    """

    config: Any
    transformer: nn.Module
    lm_head: nn.Module
    training: bool

    def modules(self) -> Any: ...
