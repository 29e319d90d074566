"""The operations of one model, with the implementation that it was asked for."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from gpt2_fast.ops.add_layernorm import add_layernorm
from gpt2_fast.ops.attention import attention, attention_decode
from gpt2_fast.ops.embedding import embedding
from gpt2_fast.ops.linear import linear
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy
from gpt2_fast.ops.mlp import mlp
from gpt2_fast.ops.runtime import dispatch

BOUND = (embedding, add_layernorm, mlp, linear, attention, attention_decode, linear_cross_entropy)


class Operations:
    """`ops.linear(x, weight, bias)` and the others, as `impl` says: see `dispatch.of_model`.

    Raises ValueError for an unknown impl, and a call ImplementationUnavailable for one that cannot run.
    """

    def __init__(self, impl: str = "auto"):
        self.impl = dispatch.checked(impl)
        for op in BOUND:
            setattr(self, op.__name__, functools.partial(self.run, op))

    def run(self, op, first: Tensor, *rest: Any, **options: Any) -> Any:
        """op(first, *rest, **options) by this model's implementation of it."""
        return op(first, *rest, **options, impl=dispatch.of_model(self.impl, op.__name__, first.device.type))
