"""GPT-2 (Radford et al., 2019), exact to Hugging Face's GPT2LMHeadModel, on fused operations.

Shapes: B batch, T time, C n_embd, H n_head, D head size (C = H D), F 4 C, V vocab_size, N = B T.

A block is the paper's, pre-LayerNorm (h is the residual stream):

    h = h + dropout(c_proj(attention(ln_1(h))))
    h = h + dropout(c_proj(gelu(c_fc(ln_2(h)))))

The sum at the end of a half is left to the LayerNorm that comes next, which makes one pass of both. So what goes from
half to half is a pair: m, what the last one computed, and h, the stream that it is still to be added to.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2_fast import checkpoint as checkpoints
from gpt2_fast import compat
from gpt2_fast.config import GPT2Config
from gpt2_fast.generate.hf import generate_batch
from gpt2_fast.modules import bias_of, foreign, is_plain_linear, is_plain_table, is_sharded, part
from gpt2_fast.ops.attention import segments_from
from gpt2_fast.ops.bound import Operations
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout, new_key
from gpt2_fast.outputs import CausalLMOutput, Head


class Call(NamedTuple):
    """What one forward pass shares: the dropout key, the segments of `attention`, and a cache; each may be None."""

    key: Tensor | None = None
    segments: Tensor | None = None
    cache: object = None

    def dropout(self, module: nn.Module, p: float, site: int) -> Dropout:
        """The dropout of `module` at one site of the model."""
        return Dropout(p, self.key, site) if module.training and p > 0.0 else NO_DROPOUT


@part
class Conv1D(nn.Module):
    """A linear layer with its weight stored [in, out], as OpenAI released it."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    @property
    def weight_io(self) -> Tensor:
        """[in, out]: what a block multiplies by, however a layer that stands in for this one stores it."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight_io + self.bias


@part
class GPT2Attention(nn.Module):
    """Causal self-attention of one layer: [B, T, C] -> [B, T, C]."""

    def __init__(
        self, config: GPT2Config, layer_idx: int, ops: Operations, linear_class: Callable[[int, int], nn.Module]
    ):
        super().__init__()
        self.ops = ops
        self.n_head, self.head_dim, self.layer_idx = config.n_head, config.n_embd // config.n_head, layer_idx
        self.scale = 1 / math.sqrt(self.head_dim) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = linear_class(config.n_embd, 3 * config.n_embd)
        self.c_proj = linear_class(config.n_embd, config.n_embd)

    def forward(self, y: Tensor, call: Call) -> Tensor:
        B, T, C = y.shape
        qkv = project(self.ops, y, self.c_attn).view(B, T, 3, self.n_head, self.head_dim)
        cache = call.cache
        if cache is not None:
            cache.write(self.layer_idx, qkv)
        if cache is None or cache.prefilling:
            dropout = call.dropout(self, self.attn_pdrop, 3 * self.layer_idx + 1)
            out_BTHD = self.ops.attention(qkv, scale=self.scale, segments=call.segments, dropout=dropout)
        else:
            keys, values = cache.layer(self.layer_idx)
            out_BTHD = self.ops.attention_decode(
                qkv[:, 0, 0], keys, values, starts=cache.starts, lengths=cache.lengths, scale=self.scale
            )
        return project(self.ops, out_BTHD.reshape(B, T, C), self.c_proj)


@part
class GPT2MLP(nn.Module):
    """The MLP with the LayerNorm and the sum before it: what is pending and the stream in, the same out."""

    def __init__(self, config: GPT2Config, ops: Operations, linear_class: Callable[[int, int], nn.Module]):
        super().__init__()
        self.ops, self.activation = ops, config.activation_function
        self.c_fc = linear_class(config.n_embd, config.n_inner_)
        self.c_proj = linear_class(config.n_inner_, config.n_embd)

    def forward(self, a: Tensor, h: Tensor, ln: nn.LayerNorm, dropout: Dropout) -> tuple[Tensor, Tensor]:
        c_fc, c_proj = self.c_fc, self.c_proj
        if is_plain_linear(c_fc) and is_plain_linear(c_proj) and foreign(ln, nn.LayerNorm) is None:
            return self.ops.mlp(
                a, h, ln.weight, bias_of(ln), c_fc.weight_io, bias_of(c_fc), c_proj.weight_io, c_proj.bias,
                eps=ln.eps, dropout=dropout, activation=self.activation,
            )  # fmt: skip
        y, h = add_layernorm(self.ops, a, h, ln, dropout)
        f = project(self.ops, y, c_fc)
        f = F.gelu(f, approximate="none" if self.activation == "gelu" else "tanh")
        return project(self.ops, f, c_proj), h


@part
class GPT2Block(nn.Module):
    """One layer: (m, h) -> (m, h), each [B, T, C]; the stream is h + dropout(m)."""

    def __init__(
        self, config: GPT2Config, layer_idx: int, ops: Operations, linear_class: Callable[[int, int], nn.Module]
    ):
        super().__init__()
        self.ops, self.layer_idx, self.resid_pdrop = ops, layer_idx, config.resid_pdrop
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer_idx, ops, linear_class)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config, ops, linear_class)

    def forward(self, m: Tensor, h: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        if (whole := self._as_one_call(m, h, call)) is not None:
            return whole
        site, p = 3 * self.layer_idx, self.resid_pdrop
        y, h = add_layernorm(self.ops, m, h, self.ln_1, call.dropout(self, p, site))
        a = self.attn(y, call)
        return self.mlp(a, h, self.ln_2, call.dropout(self, p, site + 2))

    def _as_one_call(self, m: Tensor, h: Tensor | None, call: Call) -> tuple[Tensor, Tensor] | None:
        """The same by one operation, where there is one and nothing listens to a part of the layer; else None."""
        attn, mlp, ln_1, ln_2 = self.attn, self.mlp, self.ln_1, self.ln_2
        if call.cache is not None or not self.ops.takes_block(m):
            return None
        if not (attn.ops is mlp.ops is self.ops) or attn.n_head * attn.head_dim != m.shape[-1]:
            return None
        if (
            foreign(attn, GPT2Attention)
            or foreign(mlp, GPT2MLP)
            or foreign(ln_1, nn.LayerNorm)
            or foreign(ln_2, nn.LayerNorm)
        ):
            return None
        linears = attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
        if not all(map(is_plain_linear, linears)):
            return None
        of_attn, of_proj, of_fc, of_mlp_proj = [(layer.weight_io, layer.bias) for layer in linears]
        of_fc = of_fc[0], bias_of(mlp.c_fc)
        tensors = (ln_1.weight, bias_of(ln_1), *of_attn, *of_proj, ln_2.weight, bias_of(ln_2), *of_fc, *of_mlp_proj)
        dropout = call.dropout(self, self.resid_pdrop, 3 * self.layer_idx)
        attn_pdrop = call.dropout(attn, attn.attn_pdrop, dropout.site + 1).p
        if (attn_pdrop and not dropout.p) or any(t is not None and t.dtype is not m.dtype for t in (h, *tensors)):
            return None
        return self.ops.block(
            m, h, call.segments, *tensors, n_head=attn.n_head, scale=attn.scale, ln_1_eps=ln_1.eps, ln_2_eps=ln_2.eps,
            activation=mlp.activation, attn_pdrop=attn_pdrop, dropout=dropout,
        )  # fmt: skip


def add_layernorm(
    ops: Operations, m: Tensor, h: Tensor | None, ln: nn.LayerNorm, dropout: Dropout
) -> tuple[Tensor, Tensor]:
    """(ln(h + dropout(m)), h + dropout(m)), each [B, T, C]. Without h the stream is m, and nothing is dropped."""
    dropout = NO_DROPOUT if h is None else dropout
    if foreign(ln, nn.LayerNorm):
        h = dropout.rows(m) if h is None else h + dropout.rows(m)
        return ln(h), h
    return ops.add_layernorm(m, h, ln.weight, bias_of(ln), eps=ln.eps, dropout=dropout)


def project(ops: Operations, x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x): as one operation where the layer is plainly ours, else by calling it, hooks and all."""
    return ops.linear(x, layer.weight_io, layer.bias) if is_plain_linear(layer) else layer(x)


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
        c = self.config
        drops = self.training and max(c.embd_pdrop, c.attn_pdrop, c.resid_pdrop) > 0
        segments = None
        if attention_mask is not None or document_ids is not None:
            segments = segments_from(attention_mask=attention_mask, document_ids=document_ids)
        key = (new_key(input_ids.device) if dropout_key is None else dropout_key) if drops else None
        call = Call(key, segments, cache)
        m, h = self._embed(input_ids, position_ids, token_type_ids, call), None
        for block in self.h:
            if self.gradient_checkpointing and self.training:
                # The key travels as an argument, so a second forward drops the same elements with no RNG state kept.
                m, h = checkpoint(block, m, h, call, use_reentrant=False, preserve_rng_state=False)
            else:
                m, h = block(m, h, call)
        dropout = call.dropout(self, c.resid_pdrop, 3 * c.n_layer)
        return add_layernorm(self.ops, m, h, self.ln_f, dropout)[0]

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
        if input_ids.device != self.ln_f.weight.device:
            raise ValueError(f"input_ids is on {input_ids.device} and the model on {self.ln_f.weight.device}; move one")


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
        with torch.device("meta"):  # no memory, no initialisation: every parameter is replaced below
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
        """nn.Module's, which with assign=True would leave a tied head a copy of its own.

        Raises ValueError where a tied model is given a head and a token embedding that differ.
        """
        loaded = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._check_tied()
        self.tie_weights()
        return loaded

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

        dtype: of the stored weights; None keeps the model's. Raises OSError where the folder cannot be written.
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
        input_ids: Tensor,
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
            document_ids: int [B, T]; tokens see only their own document.
            num_items_in_batch: divides the summed loss instead of the number of scored tokens, for gradient
                accumulation.
            dropout_key: int64 [1] on the model's device, from which this call's dropout is made, see
                `gpt2_fast.ops.runtime.philox`; None draws one from torch's generator. Without dropout it is not read.
            **options: transformers' other arguments, see `compat.logits_to_keep`; most must ask for nothing.
        """
        if labels is not None and targets is not None:
            raise ValueError("labels and targets are both given; labels are shifted inside, targets are not: pass one")
        keep = compat.logits_to_keep(options, not (labels is None and targets is None)) if options else 0
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
