"""What `gpt2_fast.patch` makes of transformers' GPT-2 modules: subclasses that override forward alone.

A patched module is the same object with the same parameters and names; only its class is another, as it is under
torch's parametrizations. Whatever is called here as an operation is a module that is exactly transformers' or torch's
own, without hooks: a LoRA layer, a quantized one or one that somebody listens to is called as the module it is.

    h = h + dropout(c_proj(attention(ln_1(h))))        h = h + dropout(c_proj(gelu(c_fc(ln_2(h)))))

A call that a forward does not take over goes to transformers' own, argument for argument. Signatures are read from
there, so transformers 4.57 to 5.24 need no two versions of this file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D

from gpt2_fast import modules
from gpt2_fast.hf_patch.attention import attend, is_ours, original, padding, transformers_attention
from gpt2_fast.hf_patch.outputs import CausalLMOutput
from gpt2_fast.ops.add_layernorm import add_layernorm
from gpt2_fast.ops.attention import segments_from
from gpt2_fast.ops.embedding import embedding
from gpt2_fast.ops.linear import linear
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy
from gpt2_fast.ops.mlp import mlp as fused_mlp
from gpt2_fast.ops.runtime import philox
from gpt2_fast.ops.runtime.philox import Dropout

TANH_GELUS = (type(ACT2FN["gelu_new"]), type(ACT2FN["gelu_pytorch_tanh"]))
EMBEDDING, ATTENTION, RESIDUAL = 0, 1, 2  # sites of dropout; every block draws a key of its own


def _is_idle(hook: Callable, module: nn.Module) -> bool:
    """Whether a forward hook does nothing in a call that is taken over.

    transformers 5 leaves those that record outputs in place when nothing is recorded, and gradient checkpointing makes
    embeddings require the gradient that they require anyway where they are trained.
    """
    if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
        return True
    if getattr(hook, "__name__", "") not in ("make_inputs_require_grads", "make_inputs_require_grad"):
        return False
    return module.weight.requires_grad or not torch.is_grad_enabled()


def foreign(module: nn.Module, *kinds: type) -> str | None:
    """Why `module` must be called as the module it is; None where it is plainly one of `kinds`."""
    return modules.foreign(module, *kinds, idle=_is_idle)


def _arguments(function: Callable) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD)[1:]


def _layernorm(ln: nn.Module, h: Tensor) -> Tensor:
    if foreign(ln, nn.LayerNorm):
        return ln(h)
    return add_layernorm(h, None, ln.weight, ln.bias, eps=ln.eps)[0]


def _project(module: nn.Module, x: Tensor) -> Tensor:
    return module(x) if foreign(module, Conv1D) else linear(x, module.weight, module.bias)


def _rate(dropout: nn.Module) -> float:
    return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def _drop_add(m: Tensor, h: Tensor, p: float, key: Tensor | None, ln: nn.LayerNorm) -> Tensor:
    """h + dropout(m). The normalised rows that the fused pass leaves besides are not used."""
    if p == 0.0:
        return h + m
    return add_layernorm(m, h, ln.weight.detach(), ln.bias.detach(), dropout=Dropout(p, key, RESIDUAL + 1))[1]


def mlp_fused(block: nn.Module) -> str | None:
    """Why ln_2, c_fc and the GELU are not one operation in this block; None where they are."""
    mlp = block.mlp
    parts = {"ln_2": (block.ln_2, nn.LayerNorm), "mlp": (mlp, modeling_gpt2.GPT2MLP), "mlp.c_fc": (mlp.c_fc, Conv1D)}
    for name, (module, kind) in parts.items():
        if reason := foreign(module, kind):
            return f"{name} {reason}"
    if reason := foreign(mlp.act, *TANH_GELUS):
        return f"mlp.act {reason}, not the tanh GELU" if type(mlp.act) not in TANH_GELUS else f"mlp.act {reason}"
    return None


class GPT2Block(modeling_gpt2.GPT2Block):
    """A block on fused operations; its two halves fall back one by one."""

    def forward(self, *args, **kwargs):
        call = dict(zip(_BLOCK, args, strict=False)) | kwargs
        cross = call.get("encoder_hidden_states") is not None or hasattr(self, "crossattention")
        strange = any(call.get(name) is not None for name in _STRANGE)
        if cross or strange or not isinstance(self, GPT2Block):
            return modeling_gpt2.GPT2Block.forward(self, *args, **kwargs)
        h = call.pop("hidden_states")
        drops = max(_rate(d) for d in (self.attn.attn_dropout, self.attn.resid_dropout, self.mlp.dropout)) > 0.0
        key = philox.new_key(h.device) if drops else None
        a, p, weights = GPT2Block._attention(self, _layernorm(self.ln_1, h), call, key)
        h = GPT2Block._mlp(self, a, h, p, key)
        if "output_attentions" not in _BLOCK:  # transformers 5
            return h
        return (h, weights) if call.get("output_attentions") else (h,)

    def _attention(self, y: Tensor, call: dict, key: Tensor | None) -> tuple[Tensor, float, Tensor | None]:
        """c_proj(attention(y)), the dropout that is still to be applied to it, and weights if they were asked for."""
        attn, past = self.attn, call.get(_CACHE)
        if attention_taken(self) or isinstance(past, EncoderDecoderCache):
            cross = ("encoder_hidden_states", "encoder_attention_mask")
            a, weights = attn(y, **{k: v for k, v in call.items() if k not in cross})
            return a, 0.0, weights
        B, T, _ = y.shape
        qkv = _project(attn.c_attn, y).view(B, T, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D)
        if past is not None:
            position = call.get("cache_position")
            k, v = past.update(k, v, attn.layer_idx, *(() if position is None else ({"cache_position": position},)))
        out_BTHD, _ = attend(
            attn, q, k, v, call.get("attention_mask"), implementation=original(attn.config._attn_implementation),
            dropout_p=_rate(attn.attn_dropout), rng=key, site=ATTENTION, qkv=qkv,
        )  # fmt: skip
        return _project(attn.c_proj, out_BTHD.reshape(B, T, -1)), _rate(attn.resid_dropout), None

    def _mlp(self, a: Tensor, h: Tensor, p: float, key: Tensor | None) -> Tensor:
        """The block's output, from its attention's a and the stream h that came in."""
        mlp, ln = self.mlp, self.ln_2
        dropout = Dropout(p, key if p > 0.0 else None, RESIDUAL)
        if foreign(ln, nn.LayerNorm):
            h = h + (self.attn.resid_dropout(a) if p > 0.0 else a)
            return h + mlp(ln(h))
        if mlp_fused(self) is None:
            c_proj = (None, None) if foreign(mlp.c_proj, Conv1D) else (mlp.c_proj.weight, mlp.c_proj.bias)
            m, h = fused_mlp(
                a, h, ln.weight, ln.bias, mlp.c_fc.weight, mlp.c_fc.bias, *c_proj, eps=ln.eps, dropout=dropout
            )
            m = mlp.c_proj(m) if c_proj[0] is None else m
        else:
            y, h = add_layernorm(a, h, ln.weight, ln.bias, eps=ln.eps, dropout=dropout)
            if foreign(mlp, modeling_gpt2.GPT2MLP):
                return h + mlp(y)
            f = _project(mlp.c_fc, y)
            f = mlp.act(f) if foreign(mlp.act, *TANH_GELUS) else F.gelu(f, approximate="tanh")
            m = _project(mlp.c_proj, f)
        return h + mlp.dropout(m) if foreign(mlp.dropout, nn.Dropout) else _drop_add(m, h, _rate(mlp.dropout), key, ln)


def attention_taken(block: nn.Module) -> str | None:
    """Why a block's attention stays on transformers' path; None where it runs here."""
    attn = block.attn
    if hasattr(block, "crossattention"):
        return "the model has cross-attention"
    if not is_ours(attn.config):
        return f"its implementation is {attn.config._attn_implementation!r}"
    if reason := foreign(attn, modeling_gpt2.GPT2Attention):
        return f"it {reason}"
    return (reason := foreign(attn.resid_dropout, nn.Dropout)) and f"resid_dropout {reason}"


def embedding_taken(model: nn.Module) -> str | None:
    """Why wte, wpe and dropout are not one operation in this GPT2Model; None where they are."""
    for name, kind in (("wte", nn.Embedding), ("wpe", nn.Embedding), ("drop", nn.Dropout)):
        if reason := foreign(getattr(model, name), kind):
            return f"{name} {reason}"
    for name in ("wte", "wpe"):
        table = getattr(model, name)
        if table.padding_idx is not None or table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
            return f"{name} has options of nn.Embedding that the operation does not know"
    if model.config.add_cross_attention or not is_ours(model.config) or not getattr(model.config, "is_causal", True):
        return "attention stays on transformers' path"
    return None


class GPT2Model(modeling_gpt2.GPT2Model):
    """Embedding, blocks and ln_f of a call without a past; with one, transformers' loop over the patched blocks."""

    def forward(self, *args, **kwargs):
        call = dict(zip(_MODEL, args, strict=False)) | kwargs
        theirs = modeling_gpt2.GPT2Model.forward
        if not isinstance(self, GPT2Model):
            return theirs(self, *args, **kwargs)
        weights = call.get("output_attentions")
        if (self.config.output_attentions if weights is None else weights) or call.get("head_mask") is not None:
            with transformers_attention(self.config):
                return theirs(self, *args, **kwargs)
        if embedding_taken(self) or not _is_plain_call(self, call):
            return theirs(self, *args, **kwargs)
        return GPT2Model._from_ids(self, call)

    def _from_ids(self, call: dict) -> BaseModelOutputWithPastAndCrossAttentions:
        shape = call["input_ids"].shape
        ids = call["input_ids"].view(-1, shape[-1])
        mask, positions, types = call.get("attention_mask"), call.get("position_ids"), call.get("token_type_ids")
        self.warn_if_padding_and_no_attention_mask(ids, mask)
        use_cache = _resolve(call, self.config, "use_cache") and not (self.gradient_checkpointing and self.training)
        past = DynamicCache(config=self.config) if use_cache else None
        segments = _documents(positions, ids) if mask is None and past is None else None
        if mask is not None and (mask := padding(mask.view(ids.shape))) is not None:
            segments = segments_from(mask)
        p = _rate(self.drop)
        h = embedding(
            ids, self.wte.weight, self.wpe.weight, position_ids=positions,
            token_type_ids=None if types is None else types.view(ids.shape),
            dropout=philox.Dropout(p, philox.new_key(ids.device) if p > 0.0 else None, EMBEDDING),
        )  # fmt: skip
        for block in self.h:
            out = block(h, attention_mask=segments, use_cache=use_cache, **{_CACHE: past})
            h = out[0] if isinstance(out, tuple) else out
        h = _layernorm(self.ln_f, h).view(*shape, -1)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=h, **{_CACHE: past})


def _resolve(call: dict, config, name: str):
    value = call.get(name)
    return getattr(config, name, None) if value is None else value


def _documents(position_ids: Tensor | None, ids: Tensor) -> Tensor | None:
    """The segments of sequences packed into rows, found as transformers finds them; None where there are none."""
    if position_ids is None:
        return None
    documents = find_packed_sequence_indices(position_ids.expand(ids.shape[0], -1))
    return None if documents is None else documents.to(torch.int32)


def _is_plain_call(model: nn.Module, call: dict) -> bool:
    """Token ids, at most with a padding mask, positions and types; no past and nothing to record."""
    known = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "use_cache", "return_dict",
             "num_items_in_batch", "cache_position"}  # fmt: skip
    given = {name for name, value in call.items() if value is not None and value is not False}
    ids, mask, positions = call.get("input_ids"), call.get("attention_mask"), call.get("position_ids")
    if ids is None or not given <= known or _resolve(call, model.config, "output_hidden_states"):
        return False
    if call.get("cache_position") is not None or _resolve(call, model.config, "return_dict") is False:
        return False
    if mask is not None and (mask.ndim > 3 or mask.numel() != ids.numel()):
        return False
    return positions is None or positions.ndim == 2


def loss_taken(model: nn.Module) -> str | None:
    """Why this GPT2LMHeadModel's head and loss are not one operation; None where they are."""
    if reason := foreign(model.lm_head, nn.Linear):
        return f"lm_head {reason}"
    if model.lm_head.bias is not None:
        return "lm_head has a bias"
    return None if model.loss_function is ForCausalLMLoss else "its loss_function is another"


_LOSS = {"labels", "num_items_in_batch", "ignore_index", "shift_labels"}


class GPT2LMHeadModel(modeling_gpt2.GPT2LMHeadModel):
    """With labels: the loss by chunks of logits, and `.logits` when they are asked for."""

    def forward(self, *args, **kwargs):
        call = dict(zip(_LM, args, strict=False)) | kwargs
        if not isinstance(self, GPT2LMHeadModel) or not _wants_loss(self, call) or loss_taken(self):
            return modeling_gpt2.GPT2LMHeadModel.forward(self, *args, **kwargs)
        inputs = {name: value for name, value in call.items() if name not in _LOSS and name != "logits_to_keep"}
        output = self.transformer(**inputs)
        hidden, head = output.last_hidden_state, self.lm_head.weight
        ignored, targets = call.get("ignore_index", -100), call.get("shift_labels")
        if targets is None:
            targets = F.pad(call["labels"][..., 1:], (0, 1), value=ignored)
        loss = linear_cross_entropy(
            hidden, head, targets.to(hidden.device).view(hidden.shape[:-1]), ignore_index=ignored,
            num_items=call.get("num_items_in_batch"),
        )  # fmt: skip
        return CausalLMOutput.of(
            loss, self.lm_head, hidden, modules.is_sharded(self), hidden_states=output.hidden_states,
            attentions=output.attentions, cross_attentions=output.cross_attentions,
            **{_CACHE: getattr(output, _CACHE)},
        )  # fmt: skip


def _wants_loss(model: nn.Module, call: dict) -> bool:
    """A call with labels, for an output with `.logits` as an attribute; torch.compile traces transformers' own."""
    labels, ids = call.get("labels"), call.get("input_ids")
    known = _LOSS | set(_MODEL) | {"output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"}
    keep = call.get("logits_to_keep", 0)
    return (
        labels is not None and ids is not None and labels.shape == ids.shape and labels.dtype == torch.int64
        and call.keys() <= known and isinstance(keep, int) and keep == 0
        and bool(_resolve(call, model.config, "return_dict")) and not torch.compiler.is_compiling()
    )  # fmt: skip


_BLOCK = _arguments(modeling_gpt2.GPT2Block.forward)
# transformers 5.24 calls past_key_values cache. What a block's forward does not know by name it leaves to transformers'
# own, so that an argument with another name in a later release costs time and not the result.
_CACHE = "cache" if "cache" in _BLOCK else "past_key_values"
_STRANGE = ({"past_key_values", "cache", *_BLOCK} - {_CACHE}).difference(
    ("hidden_states", "cache_position", "attention_mask", "head_mask", "encoder_hidden_states",
     "encoder_attention_mask", "use_cache", "output_attentions")
)  # fmt: skip
_MODEL = _arguments(modeling_gpt2.GPT2Model.forward)
_LM = _arguments(modeling_gpt2.GPT2LMHeadModel.forward)
PATCHED = {cls.__bases__[0]: cls for cls in (GPT2Block, GPT2Model, GPT2LMHeadModel)}

for _original, _patched in PATCHED.items():
    # Trainer and generate read what a model takes from its signature, and transformers records outputs by class.
    _patched.forward.__signature__ = inspect.signature(_original.forward)
    if hasattr(modeling_utils, "_CAN_RECORD_REGISTRY") and hasattr(_original, "_can_record_outputs"):
        dict.__setitem__(modeling_utils._CAN_RECORD_REGISTRY, str(_patched), _patched._can_record_outputs)
