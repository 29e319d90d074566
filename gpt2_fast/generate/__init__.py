"""From a model and a prompt to what follows it.

loop        ids to ids: `generate`, and `run`, the loop under every kind of generation
text        text to text: `complete`; text as tokens come, and strings that end it
hf          `GPT2LMHeadModel.generate`, with the arguments of transformers' `generate`
vocabulary  which tokenizer a model has
decoders    what runs a step: weights packed for C++, a CUDA graph, or the model itself
cache       keys and values of the tokens so far
sampling    from logits to a token
protocol    what generation asks of a model

State of the process: `decoders.PACKED`, packed copies of models' weights, each as long as its model lives, and its lock
`decoders.PACKING`.
"""

from __future__ import annotations

from gpt2_fast.lazy import exports

_NAMES = {
    "loop": ("generate",),
    "text": ("Completion", "TextStream", "complete", "completions"),
    "vocabulary": ("tokenizer_of",),
    "hf": ("generate_batch",),
    "decoders": ("make_decoder",),
    "cache": ("KVCache",),
    "sampling": ("Sampler", "Sampling", "sample"),
}
__getattr__, __dir__, __all__ = exports(__name__, _NAMES)
