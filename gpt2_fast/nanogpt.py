"""nanoGPT's `model.py` on this package's operations. In its train.py, sample.py and bench.py one line changes:

    from model import GPTConfig, GPT    ->    from gpt2_fast.nanogpt import GPTConfig, GPT

Parameters have nanoGPT's names, shapes and order, initialisation draws its random numbers, and the arithmetic is its
own (GELU by erf, biases or none), so that a seed gives the same losses, and a ckpt.pt resumes in both directions,
optimizer included. What differs:

* Logits beside a loss are a `LazyLogits`: computed when first used, so training never writes them whole.
* The optimizer is `gpt2_fast.AdamW`, `estimate_mfu` is of the card at hand, and nothing is printed.
* `generate` keeps keys and values in a cache while the text fits block_size.
* Dropout drops other elements, of the same probability.

Shapes: B batch, T time, C n_embd, F 4 C, V vocab_size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gpt2_fast import checkpoint as checkpoints
from gpt2_fast.checkpoint.nanogpt import COMPILED, nanogpt_arguments, nanogpt_config, nanogpt_state
from gpt2_fast.checkpoint.state_dict import assign_to_both, check_expressible, check_same_head
from gpt2_fast.generate.decoders import ModelDecoder
from gpt2_fast.generate.sampling import sample
from gpt2_fast.model import GPT2Model
from gpt2_fast.modules import check_tied, is_sharded
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.optim import AdamW
from gpt2_fast.outputs import CausalLMOutput, Head
from gpt2_fast.report import machine
from gpt2_fast.uncompiled import meta_device

IGNORED_TARGET = -1


@dataclasses.dataclass
class GPTConfig:
    """nanoGPT's, field by field. bias: of linear layers and LayerNorms, as in GPT-2; False: none."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

    @property
    def n_positions(self) -> int:
        """block_size by the name that the rest of this package has for it."""
        return self.block_size


class Linear(nn.Linear):
    """nn.Linear with the view of its weight that a block multiplies by."""

    @property
    def weight_io(self) -> Tensor:
        """[in, out], not copied."""
        return self.weight.t()


class _Transformer(GPT2Model):
    def _init_weights(self, module: nn.Module) -> None:
        """GPT's constructor does it, in nanoGPT's order."""


class LazyLogits:
    """The logits [B, T, V] that belong to a loss, computed when first used and then kept.

    Attributes, methods, indexing, operators and torch's functions take it for that tensor, which is `.tensor`; only
    isinstance(logits, torch.Tensor) tells them apart. Use it before the optimizer's step: the head is read then.
    """

    def __init__(self, output: CausalLMOutput):
        self._output = output

    @property
    def tensor(self) -> Tensor:
        return self._output.logits

    def __getattr__(self, name: str) -> Any:
        if name == "_output":  # asked for before __init__ ran, by copy or pickle
            raise AttributeError(name)
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda logits: logits.tensor, (args, kwargs or {}))
        return func(*args, **kwargs)


def _of_the_tensor(name: str):
    plain = lambda value: value.tensor if isinstance(value, LazyLogits) else value
    return lambda self, *args, **options: getattr(self.tensor, name)(*map(plain, args), **options)


def _in_place(name: str):
    """On the tensor, or where autograd forbids that, a view that a Function made, on a copy, which is the result."""
    plain = lambda value: value.tensor if isinstance(value, LazyLogits) else value

    def call(self, other):
        t = self.tensor
        forbidden = torch.is_grad_enabled() and t.grad_fn is not None and t._is_view()
        return getattr(t.clone() if forbidden else t, name)(plain(other))

    return call


# Python looks for operators on the type, not through __getattr__. Set after the class, __eq__ leaves its __hash__.
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
for _operator in (
    "getitem", "setitem", "delitem", "len", "iter", "reversed", "contains", "array", "repr", "format",
    "bool", "int", "float", "complex", "neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge",
    *_BINARY, *(f"r{name}" for name in _BINARY), "reduce_ex",
):  # fmt: skip
    setattr(LazyLogits, f"__{_operator}__", _of_the_tensor(f"__{_operator}__"))
for _operator in (f"__i{name}__" for name in _BINARY if name != "matmul"):
    setattr(LazyLogits, _operator, _in_place(_operator))


class GPT(nn.Module):
    """nanoGPT's GPT: see the top of this file.

    Args:
        config: sizes, dropout and bias.
        impl: see `GPT2LMHeadModel`.

    Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, config: GPTConfig, impl: str = "auto"):
        super().__init__()
        self.config = config
        gpt2_config, bias = nanogpt_config(dataclasses.asdict(config))
        self.transformer = _Transformer(gpt2_config, impl, functools.partial(Linear, bias=bias))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        if not bias:
            self._drop_biases()
        self._init_weights()
        self.register_load_state_dict_pre_hook(_accept_checkpoint)
        self.register_load_state_dict_post_hook(_tie_again)

    def _drop_biases(self) -> None:
        """LayerNorms without a bias, as the linear layers are. A block makes the zeros that an operation takes.

        No buffers: DDP would send them from rank 0 in every forward, and train.py evaluates on that rank alone.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_parameter("bias", None)

    def _init_weights(self) -> None:
        """N(0, 0.02), zero biases; c_proj divided by sqrt(2 n_layer): in the order of nanoGPT's draws."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters, the tied head counted once; without the position embeddings unless non_embedding is False."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | LazyLogits, Tensor | None]:
        """(logits, loss) of token ids int64 [B, T], T at most block_size.

        Without targets the logits [B, 1, V] of the last position, and None. With targets int64 [B, T], already
        shifted and -1 where nothing is scored, all logits as a `LazyLogits` [B, T, V], and the mean loss, float32.
        """
        untie = "train a gpt2_fast.GPT2LMHeadModel with tie_word_embeddings=False: nanoGPT's are always tied"
        check_tied(self.lm_head, self.transformer.wte, untie)
        hidden, head = self.transformer(idx), Head(self.lm_head, self.transformer.ops, is_sharded(self))
        if targets is None:
            return head.logits(hidden[:, -1:]), None
        loss = head.loss(hidden, targets, None, ignore_index=IGNORED_TARGET)
        return LazyLogits(CausalLMOutput(loss, hidden, head, head.logits_beside_loss(hidden))), loss

    def crop_block_size(self, block_size: int) -> None:
        """Keep the first block_size positions alone. Raises ValueError for more than there are."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f"block_size is {block_size} and the model has {self.config.block_size}; it can only shrink"
            )
        self.config.block_size = block_size
        transformer = self.transformer
        transformer.config = dataclasses.replace(transformer.config, n_positions=block_size)
        transformer.wpe.weight = nn.Parameter(transformer.wpe.weight.detach()[:block_size].clone())
        transformer.wpe.num_embeddings = block_size

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: Mapping[str, Any] | None = None) -> GPT:
        """OpenAI's weights, "gpt2" to "gpt2-xl", or any GPT-2 of the hub or a folder that nanoGPT could compute.

        As in nanoGPT the GELU is by erf, though GPT-2 was trained with its tanh approximation, dropout is 0 unless
        override_args = {"dropout": p}, and nothing else can be overridden.

        Raises FileNotFoundError or ValueError, one line, for what is missing or does not fit.
        """
        dropout = {"dropout": 0.0, **(override_args or {})}
        if unknown := dropout.keys() - {"dropout"}:
            raise ValueError(f"override_args has {sorted(unknown)[0]!r}; only dropout can be overridden")
        gpt2_config, state = checkpoints.load_pretrained(model_type)
        check_expressible(gpt2_config, "nanoGPT")
        with meta_device():  # no memory, no initialisation: every parameter is replaced below
            model = cls(GPTConfig(**{**nanogpt_arguments(gpt2_config), **dropout}))
        state = {name: t.clone() for name, t in nanogpt_state(state, gpt2_config).items()}
        model.load_state_dict(state, assign=True)
        model.transformer.wte.weight = model.lm_head.weight
        return model

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> AdamW:
        """AdamW with nanoGPT's two groups: weight_decay for matrices and embeddings, none for biases and LayerNorms.

        Its state dict and that of torch.optim.AdamW load into each other. device_type: "cuda" or "cpu".
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        impl = dispatch.of_model(self.transformer.impl, "adamw", device_type)
        return AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, impl=impl)

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float) -> float:
        """Model FLOPs utilisation: FLOPs a second over the most that this device's products reach.

        FLOPs a token are 6 N + 12 L C T for N parameters without positions (Chowdhery et al., 2022, arXiv:2204.02311,
        appendix B). The most is the card's dense bfloat16 peak by its maker; on an unknown card, or a CPU (in
        float32), what one product of square matrices reaches, measured at the first call.

        fwdbwd_per_iter: sequences of block_size tokens in dt seconds.
        """
        c = self.config
        flops_per_token = 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
        achieved = flops_per_token * c.block_size * fwdbwd_per_iter / dt
        return achieved / machine.peak(self.lm_head.weight.device)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """idx int64 [B, T] and max_new_tokens sampled tokens after it: int64 [B, T + max_new_tokens].

        Draws from torch's generator as nanoGPT does, so that a seed gives the same text. Past block_size the newest
        block_size tokens are computed again for each new one, as there: every position has changed. temperature 0 is
        greedy.
        """
        # Dropout, in training mode, is drawn anew for the whole text at each token.
        drops = self.training and self.config.dropout > 0
        room = min(idx.shape[1] + max_new_tokens, self.config.block_size)
        decoder = None if drops else ModelDecoder(self, idx.shape[0], room)
        for _ in range(max_new_tokens):
            token = sample(self._next_logits(idx, decoder), temperature=temperature, top_k=top_k)
            idx = torch.cat((idx, token.unsqueeze(1)), 1)
        return idx

    def _next_logits(self, idx: Tensor, decoder: ModelDecoder | None) -> Tensor:
        """Logits [B, V], float32, after idx [B, T], whose tokens but the last the decoder may hold."""
        if decoder is None or idx.shape[1] > decoder.n_positions:
            return self(idx[:, -self.config.block_size :])[0][:, -1].float()
        if decoder.length:
            return decoder.step(idx[:, -1])
        return decoder.prefill(idx, torch.zeros(idx.shape[0], dtype=torch.int32, device=idx.device))


def _accept_checkpoint(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict, strict: bool, missing: list[str], *_
) -> None:
    """The names of a compiled model's checkpoint, and the causal masks that old ones hold, are no obstacle.

    Raises ValueError for a head and a token embedding that differ, before anything is loaded.
    """
    for name in list(state_dict):
        if name.startswith(prefix + COMPILED):
            state_dict[prefix + name[len(prefix + COMPILED) :]] = state_dict.pop(name)
    for i in range(module.config.n_layer):
        state_dict.pop(f"{prefix}transformer.h.{i}.attn.bias", None)
    check_same_head(state_dict, prefix, "nanoGPT ties them; give both the same tensor")
    assign_to_both(state_dict, prefix, metadata, missing)


def _tie_again(module: nn.Module, _) -> None:
    """After a load with assign=True, which gives each name a parameter of its own."""
    module.transformer.wte.weight = module.lm_head.weight
