"""The attention and the masks that `gpt2_fast.patch` registers with transformers' attention and mask interfaces.

A model whose attention was "sdpa" becomes "gpt2_fast_sdpa": the name keeps what to put back, and what to call where
this package's kernels do not apply (masks that are no padding, several tokens on top of a cache, cross-attention).

transformers builds a [B, 1, T, T] mask and adds it to the scores. Registered here is a mask that stays the bool
[B, keys] that the caller gave (True is a token), or None where there is no padding: the kernels know what is causal.
The same value can go through transformers' mask code twice, as `generate` with a static cache does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2

from gpt2_fast.ops.attention import HEAD_MAX, HEAD_MIN, attention, attention_decode, segments_from
from gpt2_fast.ops.runtime import philox
from gpt2_fast.ops.runtime.philox import Dropout

PREFIX = "gpt2_fast_"


def original(name: str | None) -> str | None:
    """transformers' own implementation behind a registered name; any other name as it is."""
    return name[len(PREFIX) :] if name is not None and name.startswith(PREFIX) else name


def is_ours(config) -> bool:
    """Whether attention runs here: not after `set_attn_implementation`, nor within `transformers_attention`."""
    return (config._attn_implementation or "").startswith(PREFIX)


def fits(head_dim: int) -> bool:
    """Whether the kernels take this head size."""
    return HEAD_MIN <= head_dim <= HEAD_MAX


@contextmanager
def transformers_attention(config) -> Iterator[None]:
    """Within it, attention and masks are transformers' own: for a call that asks for attention weights."""
    name = config._attn_implementation
    config._attn_implementation = original(name)
    try:
        yield
    finally:
        config._attn_implementation = name


def scaling(module, implementation: str) -> float:
    """The factor of the scores. transformers 4 applies the config's options in eager attention alone."""
    if hasattr(module, "scaling"):
        return module.scaling
    if implementation != "eager":
        return module.head_dim**-0.5
    scale = module.head_dim**-0.5 if module.scale_attn_weights else 1.0
    return scale / (module.layer_idx + 1) if module.scale_attn_by_inverse_layer_idx else scale


def _transformers_function(implementation: str) -> Callable:
    eager = implementation == "eager"
    return modeling_gpt2.eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS[implementation]


def _segments(mask: Tensor | None) -> Tensor | None:
    return segments_from(mask) if mask is not None and mask.dtype == torch.bool else mask


def attend(
    module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, implementation: str, dropout_p: float,
    rng: Tensor | None = None, site: int = 0, qkv: Tensor | None = None, **kwargs,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of `module`, a GPT2Attention, in the form transformers' interface wants.

    Args:
        query [B, H, T, D]; key, value [B, H, S, D].
        mask: None; bool [B, S], True for tokens; int32 [B, T] segments (`segments_from`); or transformers' own.
        implementation: transformers' own, for what is not taken over.
        qkv: [B, T, 3, H, D], what query, key and value are views of; they are packed again without it.

    Returns:
        [B, T, H, D], and attention weights where transformers' function gives them.
    """
    T, S = query.shape[2], key.shape[2]
    scale = scaling(module, implementation)
    ours = not module.is_cross_attention and (mask is None or mask.ndim == 2) and fits(query.shape[3])
    if ours and T == S:
        if qkv is None:
            qkv = torch.stack([x.transpose(1, 2) for x in (query, key, value)], dim=2)
        segments = _segments(mask)
        return attention(qkv, scale=scale, segments=segments, dropout=Dropout(dropout_p, rng, site)), None
    if ours and T == 1 and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        B = query.shape[0]
        lengths = torch.full((B,), S, dtype=torch.int32, device=query.device)
        starts = torch.zeros_like(lengths) if mask is None else mask.int().argmax(-1).to(torch.int32)
        out = attention_decode(query[:, :, 0], key, value, starts=starts, lengths=lengths, scale=scale)
        return out.unsqueeze(1), None
    function = _transformers_function(implementation)
    if hasattr(module, "scaling"):
        kwargs["scaling"] = scale
    return function(module, query, key, value, mask, dropout=dropout_p, **kwargs)


def _attention_forward(
    implementation, module, query, key, value, attention_mask, dropout=0.0, scaling=None, head_mask=None, **kwargs
):
    """What is registered: transformers' GPT2Attention.forward calls it where a block's own forward does not."""
    rng = None
    if head_mask is not None:
        kwargs["head_mask"] = head_mask
    elif dropout > 0.0:
        rng = philox.new_key(query.device)
    return attend(
        module, query, key, value, attention_mask, implementation=implementation, dropout_p=dropout, rng=rng, **kwargs
    )


def padding(mask: Tensor | None) -> Tensor | None:
    """attention_mask [B, S] as bool, None where it hides nothing. On a GPU that is not looked at: it would wait."""
    if mask is None:
        return None
    mask = mask.to(torch.bool)
    looks = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if looks and bool(mask.all()) else mask


def _is_left_padding(mask: Tensor) -> bool:
    """Whether the visible keys of every row are one run that ends with the last: what decoding can express."""
    return bool((mask[:, 1:] >= mask[:, :-1]).all() and mask[:, -1].all())


def _mask(implementation: str, **kwargs):
    """What is registered: the mask of one forward pass, for `attend`.

    A single token on a cache that holds exactly what was seen, or no cache: the padding, [B, S]. Everything else,
    static caches among it, gets the mask of `implementation`.
    """
    mask, S = kwargs["attention_mask"], kwargs["kv_length"]
    T = kwargs["q_length"] if "q_length" in kwargs else kwargs["cache_position"].shape[0]
    simple = (
        kwargs["mask_function"] is causal_mask_function and kwargs["allow_is_causal_skip"]
        and kwargs.get("kv_offset", 0) == 0 and (mask is None or (mask.ndim == 2 and mask.shape[1] == S))
    )  # fmt: skip
    if simple and T == S:
        return padding(mask)
    grows = not isinstance(kwargs.get("q_offset"), Tensor)
    if simple and T == 1 and grows and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        mask = padding(mask)
        if mask is None or _is_left_padding(mask):
            return mask
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**kwargs)


def register(implementation: str) -> str:
    """Registers attention and masks in front of transformers' `implementation`; the name for a config."""
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, functools.partial(_attention_forward, implementation))
        AttentionMaskInterface.register(name, functools.partial(_mask, implementation))
    return name
