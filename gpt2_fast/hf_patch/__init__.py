"""What `gpt2_fast.patch` makes of a transformers GPT-2. Importing a module of this package needs transformers.

swap       patch, unpatch, and what runs where
modules    GPT2Block, GPT2Model and GPT2LMHeadModel on this package's operations
attention  this package's attention under a name in transformers' registry
outputs    an output whose logits are computed when they are asked for

State of the process: attention implementations registered with transformers, see `attention.register`.
"""

from __future__ import annotations

from gpt2_fast.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, {"swap": ("explain", "patch", "unpatch")})
