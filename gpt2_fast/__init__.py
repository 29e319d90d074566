"""GPT-2, exact to Hugging Face's, on fused Triton kernels and a C++/CUDA extension.

from gpt2_fast import GPT2Config, GPT2LMHeadModel

model = GPT2LMHeadModel(GPT2Config.from_preset("gpt2"))
loss = model(input_ids, labels=input_ids).loss
"""

from __future__ import annotations

from gpt2_fast import moved, sources
from gpt2_fast.lazy import exports

__version__ = "0.1.0"

sources.extend_path(__path__)
moved.install(__name__)

_NAMES = {
    "config": ("GPT2Config",),
    "model": ("GPT2LMHeadModel", "GPT2Model"),
    "optim": ("AdamW",),
    "ops.embedding": ("check_ids",),
    "ops.runtime.memory": ("retain_memory",),
    "data.tokenizer": ("get_tokenizer",),
    "hf_patch.swap": ("patch", "unpatch"),
}
__getattr__, __dir__, __all__ = exports(__name__, _NAMES, modules=[*moved.MOVED, "hf"])
__all__ += ["__version__"]
