"""transformers' GPT2Block, GPT2Model and GPT2LMHeadModel on this package's operations: what they do in forward.

`classes` makes whole classes of them. A patched module is the same object with the same parameters and names; only its
class is another, as it is under torch's parametrizations. Whatever is called here as an operation is a module that is
exactly transformers' or torch's own, without hooks: a LoRA layer, a quantized one or one that somebody listens to is
called as the module it is.

    h = h + dropout(c_proj(attention(ln_1(h))))        h = h + dropout(c_proj(gelu(c_fc(ln_2(h)))))

A call that a forward does not take over (`calls`) goes to transformers' own, argument for argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D

try:
    from transformers.utils import output_capturing
except ImportError:  # transformers 4 asks each block for its attention weights
    output_capturing = None

from gpt2_fast import modules
from gpt2_fast.hf_patch import attention
from gpt2_fast.hf_patch.attention import OWN, padding, transformers_mask
from gpt2_fast.hf_patch.calls import (
    BLOCK,
    CACHE,
    LM,
    LOSS,
    MODEL,
    STRANGE,
    documents,
    is_plain_call,
    resolve,
    wants_loss,
)  # fmt: skip
from gpt2_fast.hf_patch.outputs import CausalLMOutput
from gpt2_fast.modules import bias_of
from gpt2_fast.ops.add_layernorm import add_layernorm
from gpt2_fast.ops.attention import segments_from
from gpt2_fast.ops.block import block as block_op
from gpt2_fast.ops.block import takes
from gpt2_fast.ops.embedding import embedding
from gpt2_fast.ops.linear import linear
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy
from gpt2_fast.ops.mlp import mlp as fused_mlp
from gpt2_fast.ops.runtime import philox
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout

TANH_GELUS = (type(ACT2FN["gelu_new"]), type(ACT2FN["gelu_pytorch_tanh"]))
# Sites of dropout; every block draws a key of its own. The embedding has the first, from which `block_op` counts on.
FIRST, ATTENTION, AFTER_ATTENTION, AFTER_MLP = range(4)


modules.remember(
    Conv1D, *TANH_GELUS, modeling_gpt2.GPT2Attention, modeling_gpt2.GPT2MLP, modeling_gpt2.GPT2Block,
    modeling_gpt2.GPT2Model, modeling_gpt2.GPT2LMHeadModel,
)  # fmt: skip


def _records_attention() -> bool:
    """Whether transformers 5 records attention weights in this call, by hooks on its attention modules."""
    collector = getattr(output_capturing, "_active_collector", None)
    collected = None if collector is None else collector.get()
    return collected is not None and any("attentions" in key for key in collected)


def _is_idle(hook: Callable, module: nn.Module) -> bool:
    """Whether a forward hook does nothing in a call that is taken over.

    transformers 5 leaves those that record outputs in place when nothing is recorded, and gradient checkpointing makes
    embeddings require the gradient that they require anyway where they are trained.
    """
    if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
        return not _records_attention()
    if getattr(hook, "__name__", "") not in ("make_inputs_require_grads", "make_inputs_require_grad"):
        return False
    return module.weight.requires_grad or not torch.is_grad_enabled()


def foreign(module: nn.Module, *kinds: type) -> str | None:
    """Why `module` must be called as the module it is; None where it is plainly one of `kinds`."""
    return modules.foreign(module, *kinds, idle=_is_idle) or _drops_all(module)


def _drops_all(module: nn.Module) -> str | None:
    """Why a dropout is none of an operation's, whose p is below 1: torch's takes 1, and gives zeros."""
    return "drops everything" if module.__dict__.get("p") == 1.0 else None


def _layernorm(ln: nn.Module, h: Tensor) -> Tensor:
    if foreign(ln, nn.LayerNorm):
        return ln(h)
    return add_layernorm(h, None, ln.weight, bias_of(ln), eps=ln.eps)[0]


def _project(module: nn.Module, x: Tensor) -> Tensor:
    return module(x) if foreign(module, Conv1D) else linear(x, module.weight, module.bias)


def _rate(dropout: nn.Module) -> float:
    return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def _attention_rate(attn: nn.Module) -> float:
    """As in transformers 5: the rate is attn_dropout's, whatever class it is of, and attention's mode decides."""
    return getattr(attn.attn_dropout, "p", 0.0) if attn.training else 0.0


def _drop_add(m: Tensor, h: Tensor, p: float, key: Tensor | None, ln: nn.LayerNorm) -> Tensor:
    """h + dropout(m). The normalised rows that the fused pass leaves besides are not used."""
    if p == 0.0 or ln.weight is None:
        return h + Dropout(p, key, AFTER_MLP).rows(m)
    return add_layernorm(m, h, ln.weight.detach(), bias_of(ln).detach(), dropout=Dropout(p, key, AFTER_MLP))[1]


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


class BlockForward:
    """A block's forward on fused operations; its two halves fall back one by one."""

    def forward(self, *args, **kwargs):
        call = dict(zip(BLOCK, args, strict=False)) | kwargs
        cross = call.get("encoder_hidden_states") is not None or hasattr(self, "crossattention")
        strange = any(call.get(name) is not None for name in STRANGE)
        if cross or strange or not isinstance(self, BlockForward) or modules.changed(modeling_gpt2.GPT2Block):
            return modeling_gpt2.GPT2Block.forward(self, *args, **kwargs)
        h = call.pop("hidden_states")
        drops = max(_attention_rate(self.attn), _rate(self.attn.resid_dropout), _rate(self.mlp.dropout)) > 0.0
        key = philox.new_key(h.device) if drops else None
        whole, weights = BlockForward._as_one_call(self, h, call, key), None
        if whole is None:
            a, p, weights = BlockForward._attention(self, _layernorm(self.ln_1, h), call, key)
            h = BlockForward._mlp(self, a, h, p, key)
        else:
            h = _drop_add(*whole, _rate(self.mlp.dropout), key, self.ln_2)
        if "output_attentions" not in BLOCK:  # transformers 5
            return h
        return (h, weights) if call.get("output_attentions") else (h,)

    def _as_one_call(self, h: Tensor, call: dict, key: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """What the MLP computed and the stream that it is added to, by one operation on a CPU; None where a part of the
        block is not plainly transformers', and where the operation does not take the call."""
        attn, mlp, ln_1, ln_2 = self.attn, self.mlp, self.ln_1, self.ln_2
        if OWN not in call or call.get(CACHE) is not None or torch.compiler.is_compiling() or not takes(h):
            return None
        linears = attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
        plain = mlp_fused(self) is None and not foreign(ln_1, nn.LayerNorm) and not foreign(mlp.dropout, nn.Dropout)
        if not plain or any(foreign(layer, Conv1D) for layer in linears):
            return None
        of_attn, of_proj, of_fc, of_mlp_proj = [(layer.weight, layer.bias) for layer in linears]
        tensors = (ln_1.weight, ln_1.bias, *of_attn, *of_proj, ln_2.weight, ln_2.bias, *of_fc, *of_mlp_proj)
        p, attn_pdrop = _rate(attn.resid_dropout), _attention_rate(attn)
        if attn.num_heads * attn.head_dim != h.shape[-1] or (attn_pdrop and not p):
            return None
        if any(t is None or t.dtype is not h.dtype for t in tensors):
            return None
        return block_op(
            h, None, call[OWN], *tensors, n_head=attn.num_heads, scale=attention.scaling(attn), ln_1_eps=ln_1.eps,
            ln_2_eps=ln_2.eps, attn_pdrop=attn_pdrop, dropout=Dropout(p, key, FIRST) if p else NO_DROPOUT,
        )  # fmt: skip

    def _attention(self, y: Tensor, call: dict, key: Tensor | None) -> tuple[Tensor, float, Tensor | None]:
        """c_proj(attention(y)), the dropout that is still to be applied to it, and weights if they were asked for."""
        attn, past = self.attn, call.get(CACHE)
        if OWN not in call and (attention_taken(self) or not _is_causal_call(self, call)):
            cross = ("encoder_hidden_states", "encoder_attention_mask")
            a, weights = attn(y, **{k: v for k, v in call.items() if k not in cross})
            return a, 0.0, weights
        B, T, _ = y.shape
        qkv = _project(attn.c_attn, y).view(B, T, 3, attn.num_heads, attn.head_dim)
        position = call.get("cache_position")
        out_BTHD = attention.attend(
            attn, qkv, past, () if position is None else ({"cache_position": position},), call.get(OWN),
            Dropout(_attention_rate(attn), key, ATTENTION),
        )  # fmt: skip
        return _project(attn.c_proj, out_BTHD.reshape(B, T, -1)), _rate(attn.resid_dropout), None

    def _mlp(self, a: Tensor, h: Tensor, p: float, key: Tensor | None) -> Tensor:
        """The block's output, from its attention's a and the stream h that came in."""
        mlp, ln = self.mlp, self.ln_2
        dropout = Dropout(p, key if p > 0.0 else None, AFTER_ATTENTION)
        if foreign(ln, nn.LayerNorm):
            h = h + (self.attn.resid_dropout(a) if p > 0.0 else a)
            return h + mlp(ln(h))
        if mlp_fused(self) is None:
            c_proj = (None, None) if foreign(mlp.c_proj, Conv1D) else (mlp.c_proj.weight, mlp.c_proj.bias)
            m, h = fused_mlp(
                a, h, ln.weight, bias_of(ln), mlp.c_fc.weight, mlp.c_fc.bias, *c_proj, eps=ln.eps, dropout=dropout
            )
            m = mlp.c_proj(m) if c_proj[0] is None else m
        else:
            y, h = add_layernorm(a, h, ln.weight, bias_of(ln), eps=ln.eps, dropout=dropout)
            if foreign(mlp, modeling_gpt2.GPT2MLP):
                return h + mlp(y)
            f = _project(mlp.c_fc, y)
            f = mlp.act(f) if foreign(mlp.act, *TANH_GELUS) else F.gelu(f, approximate="tanh")
            m = _project(mlp.c_proj, f)
        return h + mlp.dropout(m) if foreign(mlp.dropout, nn.Dropout) else _drop_add(m, h, _rate(mlp.dropout), key, ln)


def _is_causal_call(block: nn.Module, call: dict) -> bool:
    """Whether a block that was called without OWN is asked for causal attention, no key hidden, and nothing besides."""
    past = call.get(CACHE)
    known = {CACHE, "use_cache", "position_ids", "cache_position", "num_items_in_batch", "output_hidden_states"}
    empty = past is None or (attention.grows(past) and past.get_seq_length() == 0)
    plain = all(name in known or value is None or value is False for name, value in call.items())
    return plain and empty and attention.none_is_causal(block.attn.config)


def attention_taken(block: nn.Module) -> str | None:
    """Why a block's attention stays on transformers' path; None where it runs here."""
    attn = block.attn
    if hasattr(block, "crossattention"):
        return "the model has cross-attention"
    if reason := attention.kept(attn.config):
        return reason
    if reason := foreign(attn, modeling_gpt2.GPT2Attention):
        return f"it {reason}"
    if not getattr(attn, "is_causal", True):
        return "its is_causal is False"
    if reason := foreign(attn.resid_dropout, nn.Dropout):
        return f"resid_dropout {reason}"
    return (reason := _drops_all(attn.attn_dropout)) and f"attn_dropout {reason}"


def embedding_taken(model: nn.Module) -> str | None:
    """Why wte, wpe and dropout are not one operation in this GPT2Model; None where they are."""
    for name, kind in (("wte", nn.Embedding), ("wpe", nn.Embedding), ("drop", nn.Dropout)):
        if reason := foreign(getattr(model, name), kind):
            return f"{name} {reason}"
    for name in ("wte", "wpe"):
        table = getattr(model, name)
        if table.padding_idx is not None or table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
            return f"{name} has options of nn.Embedding that the operation does not know"
    return None


def own_forward(cls: type) -> Callable:
    """The forward of `cls` as it was written: transformers 5.24 wraps it anew for every subclass of a block."""
    forward = cls.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward


def forward_of(module: nn.Module, ours: type) -> str | None:
    """Whose forward `module` runs, where that is not the one of `ours`, a class of this module."""
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if not isinstance(module, ours):
        return f"it is {type(module).__module__}.{type(module).__qualname__}"
    forward = own_forward(type(module))
    return None if forward is ours.forward else f"its forward is {forward.__module__}.{forward.__qualname__}"


def loop_taken(model: nn.Module) -> str | None:
    """Why the loop over the blocks of this GPT2Model is transformers'; None where it is `ModelForward`'s."""
    if model.config.add_cross_attention:
        return "the model has cross-attention"
    if not getattr(model.config, "is_causal", True):
        return "the config's is_causal is False"
    if getattr(model, "model_parallel", False):  # transformers 4: parallelize
        return "it is spread over several devices"
    if modules.changed(modeling_gpt2.GPT2Model):
        return "somebody gave transformers' GPT2Model another forward"
    if modules.changed(modeling_gpt2.GPT2Block):
        return "somebody gave transformers' GPT2Block another forward"
    for i, block in enumerate(model.h):
        if reason := forward_of(block, BlockForward):
            return f"h.{i}: {reason}"
    return None


class ModelForward:
    """Embedding, blocks and ln_f of a GPT2Model; a call that it does not take goes to transformers' own loop."""

    def forward(self, *args, **kwargs):
        call = dict(zip(MODEL, args, strict=False)) | kwargs
        if not isinstance(self, ModelForward) or not is_plain_call(self, call) or loop_taken(self):
            return modeling_gpt2.GPT2Model.forward(self, *args, **kwargs)
        return ModelForward._run(self, call)

    def _run(self, call: dict) -> BaseModelOutputWithPastAndCrossAttentions:
        ids, embeds, mask, past = (call.get(k) for k in ("input_ids", "inputs_embeds", "attention_mask", CACHE))
        *shape, T = ids.shape if embeds is None else embeds.shape[:-1]
        if ids is not None:
            self.warn_if_padding_and_no_attention_mask(ids, mask)
        checkpoints = self.gradient_checkpointing and self.training
        use_cache = bool(resolve(call, self.config, "use_cache")) and not checkpoints
        if past is None and use_cache:
            past = DynamicCache(config=self.config)
        h = ModelForward._embed(self, call, T, 0 if past is None else past.get_seq_length())
        options = {name: call[name] for name in ("cache_position",) if call.get(name) is not None}
        options |= {CACHE: past, "use_cache": use_cache}
        masks = ModelForward._masks(self, h, mask, past, call.get("position_ids"))
        for block, masked in zip(self.h, masks, strict=True):
            out = block(h, **masked, **options)
            h = out[0] if isinstance(out, tuple) else out
        h = _layernorm(self.ln_f, h).view(*shape, T, -1)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=h, **{CACHE: past if use_cache else None})

    def _embed(self, call: dict, T: int, start: int) -> Tensor:
        """dropout(wte(ids) + wpe(positions) (+ wte(types))) [B, T, C]; `start` tokens are in the cache."""
        ids, embeds, positions, types = (
            call.get(k) for k in ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")
        )
        ids, types = (None if t is None else t.view(-1, T) for t in (ids, types))
        if positions is None and (start or ids is None or embedding_taken(self)):
            device = (embeds if ids is None else ids).device  # not the table's, which accelerate may have put elsewhere
            positions = torch.arange(start, start + T, device=device)[None]
        if ids is not None and embedding_taken(self) is None:
            p = _rate(self.drop)
            dropout = Dropout(p, philox.new_key(ids.device) if p > 0.0 else None, FIRST)
            return embedding(
                ids, self.wte.weight, self.wpe.weight, position_ids=positions, token_type_ids=types, dropout=dropout
            )
        h = (self.wte(ids) if embeds is None else embeds) + self.wpe(positions)
        return self.drop(h if types is None else h + self.wte(types))

    def _masks(self, h: Tensor, mask: Tensor | None, past, positions: Tensor | None) -> list[dict]:
        """Block by block, what hides keys: OWN where its attention runs here, elsewhere transformers' mask."""
        mask = None if mask is None else mask.view(h.shape[0], -1)
        seen = padding(mask)
        if past is None or not past.get_seq_length():
            if seen is not None:
                seen = segments_from(seen)
            elif mask is None and past is None:
                seen = documents(positions, h)
        masks, ours = [{OWN: seen}] * len(self.h), [attention_taken(block) is None for block in self.h]
        if not all(ours):
            theirs = {"attention_mask": transformers_mask(self.config, h, mask, past, positions)}
            masks = [{OWN: seen} if is_ours else theirs for is_ours in ours]
        return masks


def loss_taken(model: nn.Module) -> str | None:
    """Why this GPT2LMHeadModel's head and loss are not one operation; None where they are."""
    if reason := foreign(model.lm_head, nn.Linear):
        return f"lm_head {reason}"
    if model.lm_head.bias is not None:
        return "lm_head has a bias"
    return None if model.loss_function is ForCausalLMLoss else "its loss_function is another"


class LMForward:
    """With labels: the loss by chunks of logits, and `.logits` when they are asked for."""

    def forward(self, *args, **kwargs):
        call = dict(zip(LM, args, strict=False)) | kwargs
        if isinstance(self, LMForward) and self.config.tie_word_embeddings:
            untie = "set model.config.tie_word_embeddings = False"
            modules.check_tied(self.lm_head, self.transformer.wte, untie)
        changed = modules.changed(modeling_gpt2.GPT2LMHeadModel)
        if changed or not isinstance(self, LMForward) or not wants_loss(self, call) or loss_taken(self):
            return modeling_gpt2.GPT2LMHeadModel.forward(self, *args, **kwargs)
        inputs = {name: value for name, value in call.items() if name not in LOSS and name != "logits_to_keep"}
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
            **{CACHE: getattr(output, CACHE)},
        )  # fmt: skip


for _forward, _original in ((BlockForward, modeling_gpt2.GPT2Block), (ModelForward, modeling_gpt2.GPT2Model),
                            (LMForward, modeling_gpt2.GPT2LMHeadModel)):  # fmt: skip
    # Trainer and generate read what a model takes from its signature.
    _forward.forward.__signature__ = inspect.signature(_original.forward)
