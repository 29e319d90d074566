"""The operations of one model, with the implementation that it was asked for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gpt2_fast.ops.add_layernorm import add_layernorm
from gpt2_fast.ops.attention import attention, attention_decode
from gpt2_fast.ops.block import block, takes
from gpt2_fast.ops.embedding import embedding
from gpt2_fast.ops.linear import linear
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy
from gpt2_fast.ops.mlp import mlp
from gpt2_fast.ops.runtime import dispatch

BOUND = (block, embedding, add_layernorm, mlp, linear, attention, attention_decode, linear_cross_entropy)


class Operations:
    """`ops.linear(x, weight, bias)` and the others, as `impl` says: see `dispatch.of_model`.

    Raises ValueError for an unknown impl, and a call ImplementationUnavailable for one that cannot run.

    Attributes:
        whole_layers: whether a layer may be one operation; a profile says more of its parts.
    """

    whole_layers = True

    def __init__(self, impl: str = "auto"):
        self.impl = dispatch.checked(impl)
        self._own = {op.__name__: functools.partial(self.run, op) for op in BOUND}
        self.__dict__.update(self._own)

    def takes_block(self, m: Tensor) -> bool:
        """Whether a layer of m [B, T, C] is best computed as one operation: not where another implementation was asked
        for or given, and a compiler sees more in its parts."""
        if not self.whole_layers or torch.compiler.is_compiling() or self.impl not in ("auto", "cpp"):
            return False
        return takes(m) and all(self.__dict__[name] is op for name, op in self._own.items())

    def run(self, op, first: Tensor, *rest: Any, **options: Any) -> Any:
        """op(first, *rest, **options) by this model's implementation of it."""
        return op(first, *rest, **options, impl=dispatch.of_model(self.impl, op.__name__, first.device.type))
