"""The torch.library namespace of the operations: ``torch.ops.gpt2_fast``."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("gpt2_fast", "DEF")


def define(schema: str) -> None:
    """Defines one operator, without its fake and its bodies."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def register(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Defines an operator whose body on CPU and CUDA is `run` and whose outputs are described by `fake`."""
    name = schema.split("(", 1)[0]
    define(schema)
    torch.library.impl(f"gpt2_fast::{name}", ("CPU", "CUDA"))(run)
    torch.library.register_fake(f"gpt2_fast::{name}")(fake)
    return getattr(torch.ops.gpt2_fast, name).default
