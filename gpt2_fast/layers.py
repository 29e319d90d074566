"""The layers of GPT-2 on fused operations: what a block is made of, and when the block is one operation.

A block is the paper's (Radford et al., 2019), pre-LayerNorm (h is the residual stream):

    h = h + dropout(c_proj(attention(ln_1(h))))
    h = h + dropout(c_proj(gelu(c_fc(ln_2(h)))))

The sum at the end of a half is left to the LayerNorm that comes next, which makes one pass of both. So what goes from
half to half is a pair: m, what the last one computed, and h, the stream that it is still to be added to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_fast.config import GPT2Config
from gpt2_fast.modules import bias_of, foreign, is_plain_linear, part
from gpt2_fast.ops.attention import head_refused
from gpt2_fast.ops.bound import Operations
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout


class Call(NamedTuple):
    """What one forward pass shares, and what it is to one block.

    Attributes:
        key, segments, cache: the dropout key, the segments of `attention`, and a cache; each may be None.
        layer: the block's place in this pass, which says its part of the cache and its sites of dropout.
        pending: the dropout of m, which comes from the block before.
    """

    key: Tensor | None = None
    segments: Tensor | None = None
    cache: object = None
    layer: int = 0
    pending: Dropout = NO_DROPOUT

    def dropout(self, module: nn.Module, p: float, site: int) -> Dropout:
        """A dropout of `module` at one of the three sites of a layer; site 3: the next's first.

        The module's mode decides; with a cache nothing is dropped, whatever mode another thread has it in.
        """
        drops = module.training and p > 0.0 and self.cache is None
        return Dropout(p, self.key, 3 * self.layer + site) if drops else NO_DROPOUT

    def after(self, block: nn.Module) -> Dropout:
        """The dropout of what `block` leaves to be added: its MLP's. A block of a user's own may have neither."""
        return self.dropout(getattr(block, "mlp", block), getattr(block, "resid_pdrop", 0.0), 3)


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
            cache.write(call.layer, qkv)
        if cache is None or cache.prefilling:
            dropout = call.dropout(self, self.attn_pdrop, 1)
            out_BTHD = self.ops.attention(qkv, scale=self.scale, segments=call.segments, dropout=dropout)
        else:
            keys, values = cache.layer(call.layer)
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
        y, h = add_layernorm(self.ops, m, h, self.ln_1, call.pending)
        a = self.attn(y, call)
        return self.mlp(a, h, self.ln_2, call.dropout(self.attn, self.resid_pdrop, 2))

    def _as_one_call(self, m: Tensor, h: Tensor | None, call: Call) -> tuple[Tensor, Tensor] | None:
        """The same by one operation, where there is one and nothing listens to a part of the layer; else None."""
        attn, mlp, ln_1, ln_2 = self.attn, self.mlp, self.ln_1, self.ln_2
        if call.cache is not None or not self.ops.takes_block(m):
            return None
        if not (attn.ops is mlp.ops is self.ops) or attn.n_head * attn.head_dim != m.shape[-1]:
            return None
        if head_refused(attn.head_dim):  # attention alone is the reference then
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
        dropout = call.dropout(attn, self.resid_pdrop, 0)  # of m and of what attention adds: one operation has one rate
        attn_pdrop = call.dropout(attn, attn.attn_pdrop, 1).p
        if (attn_pdrop and not dropout.p) or (h is not None and call.pending.p != dropout.p):
            return None
        if any(t is not None and t.dtype is not m.dtype for t in (h, *tensors)):
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
