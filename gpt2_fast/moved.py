"""Modules by the names that they had before they moved into packages: `import gpt2_fast.tokenizer` goes on working.

An old name is the same module as the new one, not a copy: what is patched in one is patched in the other.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "cards": "report.machine",
    "convert": "checkpoint.convert",
    "decoder": "generate.decoders",
    "decoding": "generate.loop",
    "doctor": "report.doctor",
    "eval_tasks": "evaluate.tasks",
    "formats": "checkpoint",
    "generate_batch": "generate.hf",
    "inspect": "report.inspect",
    "inspect_plots": "report.model_figures",
    "jsonl": "data.jsonl",
    "kv_cache": "generate.cache",
    "patch_attention": "hf_patch.attention",
    "patch_modules": "hf_patch.modules",
    "patch_outputs": "hf_patch.outputs",
    "patching": "hf_patch.swap",
    "plots": "report.figures",
    "sampling": "generate.sampling",
    "text_stream": "generate.text",
    "tokenizer": "data.tokenizer",
    "train_config": "train.config",
}


class MovedFinder:
    """Finds and loads the old names of `package`'s modules. It is asked last: a file of that name comes first."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None):
        parent, _, module = name.rpartition(".")
        return ModuleSpec(name, self) if parent == self.package and module in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own: `exec_module` puts the real one in its place."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = importlib.import_module(f"{self.package}.{MOVED[name.rpartition('.')[2]]}")


def install(package: str) -> None:
    """Lets `package`'s old names be imported; once, however often it is called."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder(package))
