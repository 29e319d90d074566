"""The operations, one file each: what it computes, its reference, its declaration, its public function, its cost.

A new one is named in ROOMS: what goes over all of them (the shared tests, `doctor`) reads it.

embedding             tokens, positions and types into the first block, with dropout
add_layernorm         the sum of two halves of a block, dropout and LayerNorm
mlp                   LayerNorm, c_fc, GELU and c_proj
linear                a product with a bias
attention             causal attention, and one query against a cache
linear_cross_entropy  head and loss, the logits never whole
block                 a layer as one call on a CPU
adamw                 one AdamW step over every parameter
adamw_contract        what it takes
adamw_table           the table through which kernels reach its tensors
adamw_kept            what it keeps of them from step to step
adamw_squares         sums of squares for the norm of gradients that several devices hold
decode_step           a whole model from token ids to the next token's logits
packed_model          the model's weights, packed for it, and a batch's keys and values
packed_weights        weights, keys and values as its products read them
packed_int4           weights of 4 bits
draw                  a token from logits
decode_tokens         several tokens, each drawn after the one before
bound                 the operations of one model, with its implementation
runtime               what all of them share

State of the process: of the operations `adamw_table._eager_table` and `chunk_rows`, the tables of the last tensors;
`block._scratch_bytes`, sizes by shape; `embedding.FAULTS`, where a device notes ids outside of the table. Of runtime
`dispatch.TABLE` and `declare.OPS`, what is declared; `dispatch.extension`, `blas.sgemm`, `cuda._module` and
`_function`, code that is loaded; `dispatch.card_refusal`, `_choice`, `_extension_missing`, `triton_missing`,
`_cuda_missing` and `cpu_policy.cpu_policy`, what this machine has; `dispatch._warn_of_card` and
`_warn_without_extension`, that a warning was given; `memory.retained` and `buffers._region`, memory that is kept.
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
