"""Attention of a patched block, and what its mask means.

The config keeps its implementation's name: a patched model decides by itself where its attention runs, and a config
that is copied, saved or given to another model is plainly transformers'. What runs here stands in for "eager", "sdpa"
and the others that transformers ships; an implementation that somebody else registered runs as it is.

transformers builds a [B, 1, T, T] mask and adds it to the scores. A patched GPT2Model leaves that out where all its
attention runs here: its blocks get the keyword OWN, which says that attention is causal and what else hides keys.

    OWN = None              nothing else
    OWN = int32 [B, T]      the segments of `ops.attention`, in a call without a past
    OWN = bool [B, S]       True for tokens, padding on the left: one token on a cache of S - 1
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2

from gpt2_fast.ops.attention import attention, attention_decode, head_refused
from gpt2_fast.ops.runtime.philox import Dropout

OWN = "gpt2_fast_mask"
_EAGER = modeling_gpt2.eager_attention_forward
_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters


def kept(config) -> str | None:
    """Why attention of this config stays on transformers' path; None where it may run here."""
    name, size = config._attn_implementation or "eager", config.n_embd // config.n_head
    function = modeling_gpt2.eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS.get(name)
    # "paged|sdpa" and the like are those of continuous batching, which keeps a cache of its own.
    shipped = function is _EAGER or getattr(function, "__module__", "").startswith("transformers.")
    if not shipped or "|" in name:
        return f"its implementation is {name!r}"
    if not getattr(config, "is_causal", True):
        return "the config's is_causal is False"
    return head_refused(size)


def none_is_causal(config) -> bool:
    """Whether a block that is called with no mask means causal attention. Eager attention then hides nothing."""
    return config._attn_implementation == "sdpa"


def grows(past: Cache | None) -> bool:
    """Whether a cache holds exactly what was seen: no static, sliding, quantised, offloaded or cross-attention one."""
    if past is None:
        return True
    return (
        type(past) is DynamicCache and not getattr(past, "offloading", False)
        and all(type(layer) is DynamicLayer for layer in past.layers)
    )  # fmt: skip


def attend(
    module, qkv: Tensor, past: Cache | None, cache_options: tuple, mask: Tensor | None, dropout: Dropout
) -> Tensor:
    """Causal attention of `module`, a GPT2Attention: [B, T, H, D].

    Args:
        qkv: [B, T, 3, H, D].
        past: None, or a cache that `grows`, which takes the new keys and values with `cache_options`.
        mask: OWN's value.
    """
    scale, T = scaling(module), qkv.shape[1]
    if past is None:
        return attention(qkv, scale=scale, segments=mask, dropout=dropout)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D)
    key, value = past.update(key, value, module.layer_idx, *cache_options)
    B, S = query.shape[0], key.shape[2]
    if T == S:
        return attention(qkv, scale=scale, segments=mask, dropout=dropout)
    if T != 1:
        raise RuntimeError(f"layer {module.layer_idx} holds {S - T} keys, and other layers none; use one cache a call")
    lengths = torch.full((B,), S, dtype=torch.int32, device=query.device)
    starts = torch.zeros_like(lengths) if mask is None else mask.int().argmax(-1).to(torch.int32)
    return attention_decode(query[:, :, 0], key, value, starts=starts, lengths=lengths, scale=scale).unsqueeze(1)


def scaling(module) -> float:
    """The factor of the scores. transformers 4 applies the config's options in eager attention alone."""
    if hasattr(module, "scaling"):
        return module.scaling
    if module.config._attn_implementation not in (None, "eager"):
        return module.head_dim**-0.5
    scale = module.head_dim**-0.5 if module.scale_attn_weights else 1.0
    return scale / (module.layer_idx + 1) if module.scale_attn_by_inverse_layer_idx else scale


def padding(mask: Tensor | None) -> Tensor | None:
    """attention_mask [B, S] as bool, None where it hides nothing. On a GPU that is not looked at: it would wait.

    Nor is it of a tensor that has no numbers, as a FakeTensor.
    """
    if mask is None:
        return None
    mask = mask.to(torch.bool)
    looks = type(mask) is Tensor and mask.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if looks and bool(mask.all()) else mask


def is_left_padding(mask: Tensor) -> bool:
    """Whether the visible keys of every row are one run that ends with the last: what decoding can express."""
    return bool((mask[:, 1:] >= mask[:, :-1]).all() and mask[:, -1].all())


def transformers_mask(config, h: Tensor, mask: Tensor | None, past: Cache | None, position_ids: Tensor | None):
    """The mask that transformers' own GPT2Model gives its blocks, for those whose attention stays there."""
    start = 0 if past is None else past.get_seq_length()
    given = {
        "config": config, "inputs_embeds": h, "input_embeds": h, "attention_mask": mask, "cache": past,
        "past_key_values": past, "position_ids": position_ids,
        "cache_position": torch.arange(start, start + h.shape[1], device=h.device),
    }  # fmt: skip
    return create_causal_mask(**{name: value for name, value in given.items() if name in _MASK_ARGUMENTS})
