"""Triton kernels, one file per op, each kernel beside its launcher.

A file here is imported only when a Triton implementation is chosen, so the package works without Triton.
Launchers take contiguous tensors and allocate their outputs; autograd, validation and dispatch are in
``gpt2_fast.ops``, which these files never import.

add_layernorm         residual, dropout and LayerNorm
mlp                   LayerNorm, product, bias and GELU
linear_gelu           the MLP's products with bias and GELU in their epilogues
gelu                  GELU and its derivative
bias                  sums over the rows of a matrix
attention             causal flash attention, forward, and both launchers
attention_backward    its backward
attention_tiles       what the two share
attention_decode      one query a head against a cache
linear_cross_entropy  softmax cross-entropy of a chunk of logits
adamw                 AdamW over every parameter in one launch
philox                dropout masks
launch                the one place where a kernel is launched
tuning                tile sizes, warps and stages from configs/
cards                 the cards: limits, configurations, and whether one has ever run
interpreter           bfloat16 in Triton's interpreter as on a GPU
aot                   compilation for a GPU that is not here
shipped               every configuration that is shipped, and what its machine code says
disassembly           the loops of a kernel's machine code

State of the process: `tuning.rows` and `tuning._row`, the configurations that were read; `cards.of_device` and
`linear_gelu._multiprocessors`, what a device is; `aot._card_arch` and `shipped._specs`, what is to be compiled.
"""
