"""GPT-2, exact to Hugging Face's, on fused Triton kernels and a C++/CUDA extension.

from gpt2_fast import GPT2Config, GPT2LMHeadModel

model = GPT2LMHeadModel(GPT2Config.from_preset("gpt2"))
loss = model(input_ids, labels=input_ids).loss
"""

from __future__ import annotations

import importlib

from gpt2_fast import sources

__version__ = "0.1.0"

# Public name -> the module that has it, imported when first asked for.
_PUBLIC = {
    "GPT2Config": "gpt2_fast.config",
    "GPT2LMHeadModel": "gpt2_fast.model",
    "GPT2Model": "gpt2_fast.model",
    "AdamW": "gpt2_fast.optim",
    "check_ids": "gpt2_fast.ops.embedding",
    "get_tokenizer": "gpt2_fast.tokenizer",
    "retain_memory": "gpt2_fast.ops.runtime.memory",
    "patch": "gpt2_fast.patching",
    "unpatch": "gpt2_fast.patching",
}
__all__ = [*_PUBLIC, "__version__"]


sources.extend_path(__path__)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gpt2_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
