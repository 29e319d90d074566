"""What `gpt2_fast.patch` makes of a transformers GPT-2. Importing a module of this package needs transformers.

swap       patch, unpatch, and what runs where
classes    transformers' classes on this package's operations
modules    the forward of their GPT2Block, GPT2Model and GPT2LMHeadModel
calls      what a call asks for, and whether it is taken
attention  what attention runs here, and its mask
outputs    an output whose logits are computed when they are asked for

State of the process: classes made for those of others, see `classes.patched_class`.
"""

from __future__ import annotations

from gpt2_fast.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, {"swap": ("explain", "patch", "unpatch")})
