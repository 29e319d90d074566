"""GPT-2 (Radford et al., 2019), exact to Hugging Face's GPT2LMHeadModel, on fused operations.

Shapes: B batch, T time, C n_embd, H n_head, D head size (C = H D), F 4 C, V vocab_size, N = B T.

A block is the paper's, pre-LayerNorm (h is the residual stream):

    h = h + dropout(c_proj(attention(ln_1(h))))
    h = h + dropout(c_proj(gelu(c_fc(ln_2(h)))))

but cut where the operations fuse: each adds what the previous half computed before it normalises, so a block
receives (y = ln_1(h), h) and returns (y = ln_1 of the next block, or ln_f; h).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2_fast import checkpoint as checkpoints
from gpt2_fast.config import GPT2Config
from gpt2_fast.ops.add_layernorm import add_layernorm
from gpt2_fast.ops.attention import attention, attention_decode, segments_from
from gpt2_fast.ops.embedding import embedding
from gpt2_fast.ops.layernorm_linear_gelu import ACTIVATIONS, layernorm_linear_gelu
from gpt2_fast.ops.linear import linear
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy
from gpt2_fast.ops.runtime import dispatch, philox
from gpt2_fast.ops.runtime.philox import Dropout


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


class GPT2Attention(nn.Module):
    """Causal self-attention of one layer: [B, T, C] -> [B, T, C]."""

    def __init__(self, config: GPT2Config, layer_idx: int, linear_class: Callable[[int, int], nn.Module] = Conv1D):
        super().__init__()
        self.n_head, self.head_dim, self.layer_idx = config.n_head, config.n_embd // config.n_head, layer_idx
        self.scale = 1 / math.sqrt(self.head_dim) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = linear_class(config.n_embd, 3 * config.n_embd)
        self.c_proj = linear_class(config.n_embd, config.n_embd)

    def forward(self, y: Tensor, segments: Tensor | None, rng: Tensor | None, cache, impl: Impl) -> Tensor:
        B, T, C = y.shape
        qkv = linear(y, self.c_attn.weight_io, self.c_attn.bias, impl=impl("linear"))
        qkv = qkv.view(B, T, 3, self.n_head, self.head_dim)
        if cache is not None:
            cache.write(self.layer_idx, qkv)
        if cache is None or cache.prefilling:
            dropout = Dropout(self.attn_pdrop if self.training else 0.0, rng, 3 * self.layer_idx + 1)
            out_BTHD = attention(qkv, scale=self.scale, segments=segments, dropout=dropout, impl=impl("attention"))
        else:
            out_BTHD = attention_decode(
                qkv[:, 0, 0], *cache.layer(self.layer_idx), starts=cache.starts, lengths=cache.lengths,
                scale=self.scale, impl=impl("attention_decode"),
            )  # fmt: skip
        return linear(out_BTHD.reshape(B, T, C), self.c_proj.weight_io, self.c_proj.bias, impl=impl("linear"))


class GPT2MLP(nn.Module):
    """The parameters of the MLP; its first half is fused with what precedes it, see GPT2Block."""

    def __init__(self, config: GPT2Config, linear_class: Callable[[int, int], nn.Module] = Conv1D):
        super().__init__()
        self.c_fc = linear_class(config.n_embd, config.n_inner_)
        self.c_proj = linear_class(config.n_inner_, config.n_embd)


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, layer_idx: int, linear_class: Callable[[int, int], nn.Module] = Conv1D):
        super().__init__()
        self.layer_idx, self.resid_pdrop, self.eps = layer_idx, config.resid_pdrop, config.layer_norm_epsilon
        self.activation = config.activation_function
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=self.eps)
        self.attn = GPT2Attention(config, layer_idx, linear_class)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=self.eps)
        self.mlp = GPT2MLP(config, linear_class)

    def forward(self, y, h, next_ln, segments, rng, cache, impl: Impl) -> tuple[Tensor, Tensor]:
        """(ln_1(h), h) -> (next_ln(h'), h'), each [B, T, C]."""
        dropout = {"dropout_p": self.resid_pdrop if self.training else 0.0, "rng": rng, "eps": self.eps}
        site = 3 * self.layer_idx
        a = self.attn(y, segments, rng, cache, impl)
        f, h, u = layernorm_linear_gelu(
            a, h, self.ln_2.weight, self.ln_2.bias, self.mlp.c_fc.weight_io, self.mlp.c_fc.bias,
            **dropout, site=site + 2, activation=self.activation, return_u=True, impl=impl("layernorm_linear_gelu"),
        )  # fmt: skip
        m = linear(f, self.mlp.c_proj.weight_io, self.mlp.c_proj.bias, gelu_of=u,
                   approximate=ACTIVATIONS[self.activation], impl=impl("linear"))  # fmt: skip
        return add_layernorm(m, h, next_ln.weight, next_ln.bias, **dropout, site=site + 3, impl=impl("add_layernorm"))


class Impl:
    """The model's `impl` for each op: the named one where the op has it, else the op's own choice."""

    def __init__(self, name: str, device_type: str):
        self.name, self.device_type = name, device_type

    def __call__(self, op: str) -> str:
        return self.name if self.name in dispatch.implementations(op, self.device_type) else "auto"


class GPT2Model(nn.Module):
    """Embeddings, blocks and the final LayerNorm: token ids [B, T] -> hidden states [B, T, C].

    linear_class: what a block's linear layers are made of, Conv1D or a module of (n_in, n_out) with its weight_io.
    """

    def __init__(self, config: GPT2Config, impl: str = "auto", linear_class: Callable[[int, int], nn.Module] = Conv1D):
        super().__init__()
        if impl not in (known := {"auto", *(name for op in dispatch.TABLE for name in dispatch.names(op))}):
            raise ValueError(f"impl is {impl!r}; choose one of {', '.join(sorted(known))}")
        self.config, self.impl = config, impl
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([GPT2Block(config, i, linear_class) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(self._init_weights)

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
    ) -> Tensor:
        self._validate(input_ids, position_ids)
        impl = Impl(self.impl, input_ids.device.type)
        c = self.config
        drops = self.training and max(c.embd_pdrop, c.attn_pdrop, c.resid_pdrop) > 0
        rng = philox.new_key(input_ids.device) if drops else None
        segments = None
        if attention_mask is not None or document_ids is not None:
            segments = segments_from(attention_mask=attention_mask, document_ids=document_ids)
        h = embedding(
            input_ids, self.wte.weight, self.wpe.weight, position_ids=position_ids, token_type_ids=token_type_ids,
            dropout=Dropout(c.embd_pdrop if self.training else 0.0, rng, 0), impl=impl("embedding"),
        )  # fmt: skip
        ln_1 = self.h[0].ln_1
        y, h = add_layernorm(h, None, ln_1.weight, ln_1.bias, eps=c.layer_norm_epsilon, impl=impl("add_layernorm"))
        following = [block.ln_1 for block in self.h][1:] + [self.ln_f]
        for block, next_ln in zip(self.h, following, strict=True):
            if self.gradient_checkpointing and self.training:
                # The key travels as an argument, so a second forward drops the same elements with no RNG state kept.
                y, h = checkpoint(block, y, h, next_ln, segments, rng, cache, impl,
                                  use_reentrant=False, preserve_rng_state=False)  # fmt: skip
            else:
                y, h = block(y, h, next_ln, segments, rng, cache, impl)
        return y

    def _validate(self, input_ids: Tensor, position_ids: Tensor | None) -> None:
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids is {input_ids.dtype} {tuple(input_ids.shape)}; it must be int64 [batch, time]")
        if position_ids is None and input_ids.shape[1] > self.config.n_positions:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} positions and the model n_positions {self.config.n_positions}; "
                "shorten the input"
            )
        if input_ids.device != self.wte.weight.device:
            raise ValueError(f"input_ids is on {input_ids.device} and the model on {self.wte.weight.device}; move one")


class CausalLMOutput:
    """`.loss` (float32 scalar, or None without labels) and `.logits` [B, T, V], computed when first asked for.

    Unpacks and indexes as transformers' output does: (loss, logits) with labels, (logits,) without.
    """

    def __init__(self, loss: Tensor | None, hidden: Tensor, head: Tensor, impl: str):
        self.loss, self.last_hidden_state = loss, hidden
        self._head, self._impl, self._logits = head, impl, None

    @property
    def logits(self) -> Tensor:
        if self._logits is None:
            # Under autocast the hidden states are of its dtype, and may outlive its block.
            head = self._head.to(self.last_hidden_state.dtype)
            self._logits = linear(self.last_hidden_state, head.t(), impl=self._impl)
        return self._logits

    def __iter__(self):
        return iter((self.logits,) if self.loss is None else (self.loss, self.logits))

    def __getitem__(self, index):
        if index == 0 and self.loss is not None:
            return self.loss
        return getattr(self, index) if isinstance(index, str) else tuple(self)[index]


class GPT2LMHeadModel(nn.Module):
    """GPT-2 with its language-modelling head, tied to the token embedding.

    State-dict names, shapes, initialisation and numerics are those of transformers' class of the same name.

    Args:
        config: sizes and dropout, see `GPT2Config.from_preset`.
        impl: "auto", or the implementation that every op which has it must use ("reference", "cpp", "triton").
    """

    def __init__(self, config: GPT2Config, impl: str = "auto"):
        super().__init__()
        self.config = config
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
    ) -> GPT2LMHeadModel:
        """The model of a folder or of a hub repository such as "gpt2", in eval mode as transformers has it.

        dtype: of the weights; None keeps what is stored. device: None is the CPU. impl: see the class.
        revision, cache_dir, local_files_only: as huggingface_hub has them; HF_HUB_OFFLINE=1 is honoured.
        Raises FileNotFoundError or ValueError, one line, for what is missing, truncated or not a GPT-2.
        """
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
        if config.tie_word_embeddings:
            model.lm_head.weight = model.transformer.wte.weight
        return model.to(device).eval()

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, which transformers' GPT2LMHeadModel.from_pretrained loads.

        dtype: of the stored weights; None keeps the model's. Raises OSError where the folder cannot be written.
        """
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        checkpoints.save_pretrained(folder, state, self.config, dtype=dtype)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options) -> Tensor:
        """input_ids int64 [B, T] and what follows them, int64 [B, T + new], as transformers' `generate` gives it.

        attention_mask: [B, T], 0 for the padding of left-padded rows. options: see `generate_batch.generate_batch`;
        max_new_tokens, do_sample, temperature, top_k, top_p, eos_token_id, stop_strings, streamer, seed and others.
        Raises ValueError, one line, for what it does not do.
        """
        from gpt2_fast.generate_batch import generate_batch  # above this module: imported where it is needed

        return generate_batch(self, input_ids, attention_mask, **options)

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Keeps only the inputs of each block in training and computes the rest again in backward."""
        self.transformer.gradient_checkpointing = enabled

    def num_parameters(self) -> int:
        """Parameters, the tied head counted once."""
        return sum(p.numel() for p in self.parameters())

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
        """
        if labels is not None and targets is not None:
            raise ValueError("labels and targets are both given; labels are shifted inside, targets are not: pass one")
        hidden = self.transformer(input_ids, attention_mask, position_ids, token_type_ids, document_ids)
        head = self.lm_head.weight
        impl = Impl(self.transformer.impl, hidden.device.type)
        loss = None
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(f"labels is {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)}")
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if targets is not None:
            loss = linear_cross_entropy(
                hidden, head, targets, num_items=num_items_in_batch, impl=impl("linear_cross_entropy")
            )
        return CausalLMOutput(loss, hidden, head, impl("linear"))
