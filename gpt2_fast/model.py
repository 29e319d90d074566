"""GPT-2 (Radford et al., 2019), exact to Hugging Face's GPT2LMHeadModel, on fused operations.

Shapes: B batch, T time, C n_embd, H n_head, D head size (C = H D), F 4 C, V vocab_size, N = B T. `layers` has the
block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2_fast import checkpoint as checkpoints
from gpt2_fast import compat
from gpt2_fast.checkpoint.state_dict import assign_to_both, check_same_head
from gpt2_fast.config import GPT2Config
from gpt2_fast.generate.hf import generate_batch
from gpt2_fast.layers import GPT2MLP, Call, Conv1D, GPT2Attention, GPT2Block, add_layernorm
from gpt2_fast.modules import GATHER, check_tied, has_hooks, is_plain_table, is_sharded, part
from gpt2_fast.ops.attention import segments_from
from gpt2_fast.ops.bound import Operations
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.philox import new_key
from gpt2_fast.outputs import CausalLMOutput, Head
from gpt2_fast.uncompiled import meta_device


@part
class GPT2Model(nn.Module):
    """Embeddings, blocks and the final LayerNorm: token ids [B, T] -> hidden states [B, T, C].

    linear_class: what a block's linear layers are made of, Conv1D or a module of (n_in, n_out) with its weight_io.
    """

    def __init__(self, config: GPT2Config, impl: str = "auto", linear_class: Callable[[int, int], nn.Module] = Conv1D):
        super().__init__()
        self.config, self.ops = config, Operations(impl)
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([GPT2Block(config, i, self.ops, linear_class) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(self._init_weights)

    @property
    def impl(self) -> str:
        """What the operations run on, as it was asked for; may be set."""
        return self.ops.impl

    @impl.setter
    def impl(self, name: str) -> None:
        self.ops.impl = dispatch.checked(name)

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range), zero biases; c_proj divided by sqrt(2 n_layer), for the residual sums it feeds."""
        std = self.config.initializer_range
        if isinstance(module, (Conv1D, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, (GPT2Attention, GPT2MLP)):
            nn.init.normal_(module.c_proj.weight, std=std / math.sqrt(2 * self.config.n_layer))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache=None,
        dropout_key: Tensor | None = None,
    ) -> Tensor:
        self._validate(input_ids, position_ids)
        segments = None
        if attention_mask is not None or document_ids is not None:
            segments = segments_from(attention_mask=attention_mask, document_ids=document_ids)
        drops = cache is None and self._drops()
        key = (new_key(input_ids.device) if dropout_key is None else dropout_key) if drops else None
        call = Call(key, segments, cache)
        m, h = self._embed(input_ids, position_ids, token_type_ids, call), None
        for i, block in enumerate(self.h):
            call = call._replace(layer=i)
            if self.gradient_checkpointing and self.training:
                # The key travels as an argument, so a second forward drops the same elements with no RNG state kept.
                m, h = checkpoint(block, m, h, call, use_reentrant=False, preserve_rng_state=False)
            else:
                m, h = block(m, h, call)
            call = call._replace(pending=call.after(block))
        return add_layernorm(self.ops, m, h, self.ln_f, call.pending)[0]

    def _drops(self) -> bool:
        """Whether a part of the model drops anything: each is in a mode of its own."""
        c = self.config
        if max(c.embd_pdrop, c.attn_pdrop, c.resid_pdrop) == 0:
            return False
        parts = (getattr(block, name, block) for block in self.h for name in ("attn", "mlp"))
        return self.training or any(part.training for part in parts)

    def _embed(
        self, input_ids: Tensor, position_ids: Tensor | None, token_type_ids: Tensor | None, call: Call
    ) -> Tensor:
        """dropout(wte(ids) + wpe(positions) (+ wte(types))) [B, T, C]."""
        dropout = call.dropout(self, self.config.embd_pdrop, 0)
        if is_plain_table(self.wte) and is_plain_table(self.wpe):
            return self.ops.embedding(
                input_ids, self.wte.weight, self.wpe.weight,
                position_ids=position_ids, token_type_ids=token_type_ids, dropout=dropout,
            )  # fmt: skip
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        if hasattr(self.wte.weight, "device_mesh") and not has_hooks(self.wte):
            raise ValueError(f"GPT2Model: {GATHER}, or call that model and not a part of it")
        h = self.wte(input_ids) + self.wpe(position_ids)
        return dropout.rows(h if token_type_ids is None else h + self.wte(token_type_ids))

    def _validate(self, input_ids: Tensor, position_ids: Tensor | None) -> None:
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids is {input_ids.dtype} {tuple(input_ids.shape)}; it must be int64 [batch, time]")
        if position_ids is None and input_ids.shape[1] > self.config.n_positions:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} positions and the model n_positions {self.config.n_positions}; "
                "shorten the input"
            )
        weight = getattr(self.ln_f, "weight", None)
        if weight is not None and input_ids.device != weight.device:
            raise ValueError(f"input_ids is on {input_ids.device} and the model on {weight.device}; move one")


class GPT2LMHeadModel(compat.Compatible):
    """GPT-2 with its language-modelling head, tied to the token embedding.

    State-dict names, shapes, initialisation and numerics are those of transformers' class of the same name.

    Args:
        config: sizes and dropout, see `GPT2Config.from_preset`; transformers' GPT2Config is taken too.
        impl: "auto", or the implementation that every op which has it must use ("reference", "cpp", "triton").
    """

    def __init__(self, config: GPT2Config, impl: str = "auto"):
        super().__init__()
        self.config = config = compat.config_of(config)
        self.transformer = GPT2Model(config, impl)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False, device="meta")
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        else:
            self.lm_head.weight = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
            nn.init.normal_(self.lm_head.weight, std=config.initializer_range)
        self.register_load_state_dict_post_hook(_tie_again)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        impl: str = "auto",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> GPT2LMHeadModel:
        """The model of a folder or of a hub repository such as "gpt2", in eval mode as transformers has it.

        Args:
            name_or_folder: a folder, or a repository such as "gpt2" or "openai-community/gpt2-xl".
            dtype, device: of the weights; None keeps what is stored, and is the CPU.
            impl: see the class.
            revision, cache_dir, local_files_only: as huggingface_hub has them; HF_HUB_OFFLINE=1 is honoured.
            **options: transformers' names, see `compat.placement`: torch_dtype, device_map of one device.

        Raises:
            FileNotFoundError, ValueError: one line, for what is missing, truncated or not a GPT-2.
        """
        dtype, device = compat.placement(dtype, device, options)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; weights are float32, bfloat16, float16 or float64")
        config, state = checkpoints.load_pretrained(
            name_or_folder, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, dtype=dtype
        )
        with meta_device():  # no memory, no initialisation: every parameter is replaced below
            model = cls(config, impl)
        # A mapped file's tensors start at any multiple of 8 bytes, torch's own at 64, as vector loads like it.
        state = {name: tensor.clone() if tensor.data_ptr() % 64 else tensor for name, tensor in state.items()}
        model.load_state_dict(state, strict=True, assign=True)
        return model.to(device).eval()

    def tie_weights(self) -> None:
        """Makes the head's weight the token embedding's, where config.tie_word_embeddings says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """nn.Module's, and a tied head stays tied: with assign=True too, and after an error.

        Raises ValueError where a tied model is given a head and a token embedding that differ; nothing is loaded then.
        """
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, *rest) -> None:
        """Called before any weight is loaded, by wrappers' load_state_dict too; `state_dict` is torch's own copy."""
        if self.config.tie_word_embeddings:
            fix = "give both the same tensor, or make the model with tie_word_embeddings=False"
            check_same_head(state_dict, prefix, f"config.tie_word_embeddings is true; {fix}")
            assign_to_both(state_dict, prefix, local_metadata, missing)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)

    def _check_tied(self) -> None:
        head, wte = self.lm_head.weight, self.transformer.wte.weight
        if not self.config.tie_word_embeddings or head is wte or head.is_meta or wte.is_meta:
            return
        if head.shape != wte.shape or not torch.equal(head, wte):
            raise ValueError(
                "lm_head.weight and transformer.wte.weight differ and config.tie_word_embeddings is true; call "
                "tie_weights(), which keeps the embedding's, or set it to false"
            )

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, which transformers' GPT2LMHeadModel.from_pretrained loads.

        dtype: of the stored weights; None keeps the model's. Raises OSError where the folder cannot be written, and
        TypeError for weights that are sharded over ranks (DTensors).
        """
        self._check_tied()
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        checkpoints.save_pretrained(folder, state, self.config, dtype=dtype)

    def generate(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """input_ids int64 [B, T] and what follows them, int64 [B, T + new], as transformers' `generate` gives it.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 for the padding of left-padded rows.
            **options: see `generate_batch`; max_new_tokens, do_sample, temperature, top_k, top_p, eos_token_id,
                stop_strings, streamer, seed and others.

        Raises:
            ValueError: one line, for what it does not do.
        """
        return generate_batch(self, input_ids, attention_mask, **options)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        document_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        dropout_key: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutput:
        """Logits, and the loss where labels or targets are given.

        Args:
            input_ids: int64 [B, T], T at most n_positions.
            attention_mask: [B, T], 1 for tokens and 0 for padding on either side. As in transformers, only keys
                are masked: what the model says at padding is not defined, so give padding the label -100.
            position_ids: int64 [B, T] or [T]; 0 .. T - 1 unless given.
            token_type_ids: int64 [B, T], embedded by wte and added.
            labels: int64 [B, T], usually input_ids; shifted inside: position t is scored against labels[t + 1].
                -100 is not scored.
            targets: int64 [B, T], instead of labels, for data already shifted: position t is scored against
                targets[t].
            document_ids: int [B, T], from 0 to 2^31 - 1; tokens see only their own document.
            num_items_in_batch: divides the summed loss instead of the number of scored tokens, for gradient
                accumulation.
            dropout_key: int64 [1] on the model's device, from which this call's dropout is made, see
                `gpt2_fast.ops.runtime.philox`; None draws one from torch's generator. Without dropout it is not read.
            **options: transformers' other arguments, see `compat.logits_to_keep`; most must ask for nothing.
        """
        if labels is not None and targets is not None:
            raise ValueError("labels and targets are both given; labels are shifted inside, targets are not: pass one")
        keep = compat.logits_to_keep(options, not (labels is None and targets is None)) if options else 0
        if input_ids is None:
            raise ValueError("input_ids is missing; pass token ids, int64 [B, T]")
        if self.config.tie_word_embeddings:
            check_tied(self.lm_head, self.transformer.wte, "make the model with tie_word_embeddings=False")
        hidden = self.transformer(
            input_ids, attention_mask, position_ids, token_type_ids, document_ids, dropout_key=dropout_key
        )
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(f"labels is {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)}")
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        head = Head(self.lm_head, self.transformer.ops, is_sharded(self))
        if targets is None:
            hidden = hidden[:, -keep:]  # -0 keeps all
            return CausalLMOutput(None, hidden, head, head.logits(hidden))
        loss = head.loss(hidden, targets, num_items_in_batch)
        return CausalLMOutput(loss, hidden, head, head.logits_beside_loss(hidden))


def _tie_again(model: GPT2LMHeadModel, _) -> None:
    """After a load, which with assign=True gives head and embedding a parameter each."""
    model.tie_weights()
