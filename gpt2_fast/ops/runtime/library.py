"""The torch.library namespace of the operations: ``torch.ops.gpt2_fast``."""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("gpt2_fast", "DEF")


def define(schema: str) -> None:
    """Defines one operator. Its fake and its CPU and CUDA bodies are registered in the room."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
