"""What a call of transformers' GPT-2 asks for, and whether the forwards of `modules` take it.

Signatures are read from transformers, so its releases 4.57 to 5.24 need no two versions of this file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.masking_utils import find_packed_sequence_indices
from transformers.models.gpt2 import modeling_gpt2

from gpt2_fast.hf_patch import attention
from gpt2_fast.hf_patch.attention import padding


def arguments(function: Callable) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD)[1:]


BLOCK = arguments(modeling_gpt2.GPT2Block.forward)
# transformers 5.24 calls past_key_values cache. What a block's forward does not know by name it leaves to transformers'
# own, so that an argument with another name in a later release costs time and not the result.
CACHE = "cache" if "cache" in BLOCK else "past_key_values"
STRANGE = ({"past_key_values", "cache", *BLOCK} - {CACHE}).difference(
    ("hidden_states", "cache_position", "attention_mask", "head_mask", "encoder_hidden_states",
     "encoder_attention_mask", "use_cache", "output_attentions")
)  # fmt: skip
MODEL = arguments(modeling_gpt2.GPT2Model.forward)
LM = arguments(modeling_gpt2.GPT2LMHeadModel.forward)
LOSS = {"labels", "num_items_in_batch", "ignore_index", "shift_labels"}


def resolve(call: dict, config, name: str):
    value = call.get(name)
    return getattr(config, name, None) if value is None else value


def documents(position_ids: Tensor | None, h: Tensor) -> Tensor | None:
    """The segments of sequences packed into rows, found as transformers finds them; None where there are none."""
    if position_ids is None:
        return None
    documents = find_packed_sequence_indices(position_ids.expand(h.shape[0], -1))
    return None if documents is None else documents.to(torch.int32)


def is_plain_call(model: nn.Module, call: dict) -> bool:
    """Token ids or embeddings, at most with a padding mask, positions, types and a past; nothing to record."""
    known = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "use_cache",
             "return_dict", "num_items_in_batch", CACHE}  # fmt: skip
    known |= {"cache_position"} & set(MODEL)  # transformers 5 has none
    given = {name for name, value in call.items() if value is not None and value is not False}
    if not given <= known or ("input_ids" in given) == ("inputs_embeds" in given):
        return False
    if resolve(call, model.config, "output_hidden_states") or resolve(call, model.config, "output_attentions"):
        return False
    if resolve(call, model.config, "return_dict") is False:
        return False
    positions, types, embeds = call.get("position_ids"), call.get("token_type_ids"), call.get("inputs_embeds")
    if (positions is not None and positions.ndim != 2) or (embeds is not None and embeds.ndim != 3):
        return False
    tokens = call["input_ids"] if embeds is None else embeds[..., 0]
    return (types is None or types.shape == tokens.shape) and _is_plain_past(model, call, tokens)


def _counts_from(position: Tensor | None, start: int, T: int) -> bool:
    """Whether transformers 4's cache_position says what is so without it. In a traced call that cannot be looked at."""
    if position is None:
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.equal(position, torch.arange(start, start + T, device=position.device))


def _is_plain_past(model: nn.Module, call: dict, tokens: Tensor) -> bool:
    """A call without a past, or one token without gradients on a cache that grows; a mask of padding over both."""
    past, mask, position = call.get(CACHE), call.get("attention_mask"), call.get("cache_position")
    if past is None:
        plain = mask is None or (mask.ndim <= 3 and mask.numel() == tokens.numel())
        return plain and _counts_from(position, 0, tokens.shape[-1])
    checkpoints = model.gradient_checkpointing and model.training
    if tokens.ndim != 2 or torch.compiler.is_compiling() or checkpoints or not attention.grows(past):
        return False
    (B, T), start = tokens.shape, past.get_seq_length()
    if mask is not None and tuple(mask.shape) != (B, start + T):
        return False
    if not _counts_from(position, start, T):
        return False
    if start == 0:
        return True
    if T != 1 or model.training or torch.is_grad_enabled():
        return False
    mask = padding(mask)
    return mask is None or attention.is_left_padding(mask)


def wants_loss(model: nn.Module, call: dict) -> bool:
    """A call with labels, for an output with `.logits` as an attribute; torch.compile traces transformers' own."""
    labels, ids = call.get("labels"), call.get("input_ids")
    known = LOSS | set(MODEL) | {"output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"}
    keep = call.get("logits_to_keep", 0)
    return (
        labels is not None and ids is not None and labels.shape == ids.shape and labels.dtype == torch.int64
        and call.keys() <= known and isinstance(keep, int) and keep == 0
        and bool(resolve(call, model.config, "return_dict")) and not torch.compiler.is_compiling()
    )  # fmt: skip
