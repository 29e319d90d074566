"""The operations, one file each: what it computes, its reference, its declaration, its public function, its cost.

A new one is named in ROOMS: what goes over all of them (the shared tests, `doctor`) reads it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

ROOMS = (
    "embedding", "add_layernorm", "mlp", "linear", "attention", "linear_cross_entropy", "adamw", "decode_step", "draw",
    "decode_tokens", "block",
)  # fmt: skip


def rooms() -> dict[str, ModuleType]:
    """Every operation's file, imported: then `runtime.dispatch.TABLE` has all of them."""
    return {name: importlib.import_module(f"{__name__}.{name}") for name in ROOMS}
