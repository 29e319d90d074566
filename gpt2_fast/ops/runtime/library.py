"""The torch.library namespace of the operations: ``torch.ops.gpt2_fast``."""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "gpt2_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str) -> None:
    """Defines one operator, without its fake and its bodies."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def register(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Defines an operator whose body on CPU and CUDA is `run` and whose outputs are described by `fake`."""
    name = schema.split("(", 1)[0]
    define(schema)
    torch.library.impl(f"{NAMESPACE}::{name}", ("CPU", "CUDA"))(run)
    torch.library.register_fake(f"{NAMESPACE}::{name}")(fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
