"""decode_step: GPT-2 from token ids to the next token's logits against a cache, one call for the whole batch.

    h = wte[token] + wpe[position]
    h = h + c_proj(attention(c_attn(ln_1(h))));  h = h + c_proj(gelu(c_fc(ln_2(h))))    for every layer
    logits = lm_head(ln_f(h))                                                          for each row's newest token

On a CPU all of this is one call into C++ and one parallel region: through Python a step of the 124M model is a
hundred calls, which cost more than its arithmetic. Its bound is reading every weight once, so the weights are packed
once, in the order in which they are read (`packed_model`), in float32, bfloat16, int8 or int4.

Row b begins at starts[b]; what is left of it is padding, which is neither computed nor stored. A row's keys and
values are indexed by its own positions, so it decodes to the same bits alone and in any batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_fast.ops.packed_weights import PackedMatrix
from gpt2_fast.ops.runtime import cpp, dispatch
from gpt2_fast.ops.runtime.contract import check_dense
from gpt2_fast.ops.runtime.gelu import ACTIVATIONS

if TYPE_CHECKING:
    from gpt2_fast.ops.packed_model import PackedCache, PackedModel

OP = "decode_step"
dispatch.TABLE[OP] = {"cuda": ("reference",), "cpu": ("cpp", "reference")}


@torch.no_grad()
def decode_step_reference(packed: PackedModel, tokens: Tensor, cache: PackedCache) -> Tensor:
    """What is correct: plain PyTorch in packed.dtype on the weights that the packed numbers mean."""
    config, dtype = packed.config, packed.dtype
    tokens = tokens.view(cache.batch_size, -1)
    (B, T), H, first = tokens.shape, config.n_head, cache.length
    last = first + T

    def linear(x: Tensor, matrix: PackedMatrix) -> Tensor:
        return F.linear(
            x, matrix.dequantised(dtype), None if matrix.bias is None else matrix.bias[: matrix.shape[0]].to(dtype)
        )

    def normed(h: Tensor, parameters: tuple[Tensor, Tensor]) -> Tensor:
        weight, bias = (p[: config.n_embd].to(dtype) for p in parameters)
        return F.layer_norm(h, h.shape[-1:], weight, bias, config.layer_norm_epsilon)

    index, starts = torch.arange(last, device="cpu"), cache.starts.unsqueeze(1)
    visible = (index >= starts).view(B, 1, 1, last) & (index <= index[first:].unsqueeze(1))  # (B, 1, T, last)
    h = packed.wte.dequantised(dtype)[tokens] + packed.wpe.to(dtype)[(index[first:] - starts).clamp(min=0)]
    for i, layer in enumerate(packed.layers):
        c_attn, attn_proj, c_fc, mlp_proj = layer.matrices
        qkv = linear(normed(h, layer.ln_1), c_attn).view(B, T, 3, H, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        for held, new in ((cache.keys, qkv[1]), (cache.values, qkv[2])):
            held[i, :, :, first:last] = new.to(packed.cache_dtype)
        scores = qkv[0] @ cache.keys[i, :, :, :last].transpose(-1, -2) * layer.scale
        probabilities = scores.masked_fill(~visible, torch.finfo(dtype).min).softmax(-1)
        out = probabilities @ cache.values[i, :, :, :last]
        h = h + linear(out.transpose(1, 2).reshape(B, T, -1), attn_proj)
        f = linear(normed(h, layer.ln_2), c_fc)
        h = h + linear(F.gelu(f, approximate=ACTIVATIONS[config.activation_function].approximate), mlp_proj)
    return linear(normed(h[:, -1], packed.ln_f), packed.lm_head)


def _rows(tokens: Tensor, cache: PackedCache) -> dict[str, Tensor]:
    """The tokens [B, T] that are no padding, laid flat, and of each its sequence and its position, int32."""
    (B, T), first = tokens.shape, cache.length
    positions = torch.arange(first, first + T, dtype=torch.int32, device="cpu") - cache.starts.unsqueeze(1)
    sequences = cache.sequences.unsqueeze(1).expand(B, T)
    if cache.last_start > first:
        real = positions >= 0
        tokens, positions, sequences = tokens[real], positions[real], sequences[real]
    return {"tokens": tokens.contiguous(), "sequences": sequences.contiguous(), "positions": positions.contiguous()}


def _decode_step_cpp(packed: PackedModel, tokens: Tensor, cache: PackedCache, logits: Tensor) -> None:
    if tokens.numel() == cache.batch_size:  # a token a row, none of which is padding, or `check_tokens` had refused it
        rows = {"tokens": tokens, "sequences": cache.sequences, "positions": None}
        if not tokens.is_contiguous():
            rows["tokens"] = tokens.contiguous()
    else:
        rows = _rows(tokens, cache)
    cpp.decode_step(
        **rows, model=packed._table, cache=cache._table, rows=rows["tokens"].numel(), first=cache.length, logits=logits,
        threads=cache.threads,
    )  # fmt: skip


def decode_step(packed: PackedModel, tokens: Tensor, cache: PackedCache, out: Tensor | None = None) -> Tensor:
    """Appends tokens to every row of the cache; returns the logits of the token after the newest. No gradient.

    A step reads more weights than the processor's caches hold, so what Python and torch need comes from memory after
    it: torch is called seldom here.

    Args:
        packed: the weights.
        tokens: int64 [B, T] on the CPU, T >= 1, or [B], one a row; what a row holds before its start is ignored.
        cache: holds the keys and values before them; grows by T positions.
        out: see `PackedModel.step`.

    Returns:
        [B, V] float32.

    Raises:
        ValueError: a shape or dtype that does not fit, a cache that is too short or another model's, a row that is
            all padding.
        IndexError: a token outside the vocabulary.
    """
    check_tokens(OP, packed, tokens, cache)
    check_out(OP, packed, cache, out)
    if packed.impl == "reference":
        logits = decode_step_reference(packed, tokens, cache)
        out = logits if out is None else out.copy_(logits)
    else:
        if out is None:
            out = torch.empty(cache.batch_size, packed.config.vocab_size, dtype=torch.float32, device="cpu")
        _decode_step_cpp(packed, tokens, cache, out)
        torch.autograd.graph.increment_version(out)  # who keeps it for a backward is told that it changed
    cache.length += 1 if tokens.ndim == 1 else tokens.shape[1]
    return out


def check_out(op: str, packed: PackedModel, cache: PackedCache, out: Tensor | None) -> None:
    """Raises ValueError for an `out` that logits cannot be written to."""
    if out is None:
        return
    check_dense(op, "out", out)
    shape = (cache.batch_size, packed.config.vocab_size)
    if out.shape != shape or out.dtype != torch.float32 or out.requires_grad or not out.is_cpu or out.is_neg():
        raise ValueError(
            f"{op}: out is {out.dtype} {tuple(out.shape)} on {out.device}; it must be float32 {shape} on the CPU, "
            "without a gradient, and no view that is negated"
        )


def check_tokens(op: str, packed: PackedModel, tokens: Tensor, cache: PackedCache, steps: int = 1) -> None:
    """Raises as `decode_step` does, for tokens [B, T] or [B] and steps - 1 further ones a row."""
    if cache._of() is not packed:
        raise ValueError(f"{op}: the cache was made for another PackedModel; make PackedCache(packed, ...) of this one")
    check_dense(op, "tokens", tokens)
    shape = tokens.shape
    count = 1 if len(shape) == 1 else shape[1] if len(shape) == 2 else 0  # tokens of a row
    if tokens.dtype != torch.int64 or count == 0 or shape[0] != cache.batch_size or not tokens.is_cpu:
        raise ValueError(
            f"{op}: tokens is {tokens.dtype} {tuple(tokens.shape)} on {tokens.device}; it must be int64 on the CPU, "
            f"{cache.batch_size} rows of at least one token"
        )
    filled = cache.length + count
    if filled + steps - 1 > cache.n_positions:
        raise ValueError(
            f"{op}: the cache is for {cache.n_positions} positions and {filled + steps - 1} are needed; make it longer"
        )
    if cache.last_start >= filled:
        raise ValueError(f"{op}: a row starts at {cache.last_start} and has no token among {filled} positions")
    ends = tokens.tolist() if len(shape) == 1 else torch.aminmax(tokens)  # of a step: few
    low, high = int(min(ends)), int(max(ends))
    if low < 0 or high >= packed.config.vocab_size:
        wrong = low if low < 0 else high
        raise IndexError(f"{op}: token {wrong} is outside the vocabulary of {packed.config.vocab_size}")


def samples():
    """Sizes (fields of GPT2Config), tokens [B, T] and starts [B] that tests read, smallest first."""
    generator = torch.Generator().manual_seed(0)
    for B, T, sizes in [
        (1, 3, {"n_layer": 1, "n_embd": 4, "n_head": 1, "vocab_size": 5, "n_inner": 3}),
        (3, 11, {"n_layer": 2, "n_embd": 80, "n_head": 5, "vocab_size": 301, "scale_attn_by_inverse_layer_idx": True}),
        (9, 8, {"n_layer": 1, "n_embd": 96, "n_head": 3, "vocab_size": 301, "tie_word_embeddings": False}),
        (
            3,
            8,
            {"n_layer": 1, "n_embd": 70, "n_head": 5, "n_inner": 33, "vocab_size": 37, "activation_function": "gelu"},
        ),
        (2, 24, {"n_layer": 1, "n_embd": 256, "n_head": 2, "vocab_size": 64, "scale_attn_weights": False}),
    ]:
        tokens = torch.randint(sizes["vocab_size"], (B, T), generator=generator)
        yield sizes, tokens, torch.arange(B, dtype=torch.int32) * 3 % 5


def cost(packed: PackedModel, B: int, length: int) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one step of B rows that hold `length` positions: every weight and every key and value once."""
    c = packed.config
    layers = len(packed.layers)
    blocks = layers * c.n_embd * (4 * c.n_embd + 2 * c.n_inner_)
    held = 2 * layers * c.n_embd * length
    weights = sum(m.nbytes for m in (packed.lm_head, *(m for layer in packed.layers for m in layer.matrices)))
    flops = 2 * B * (blocks + c.vocab_size * c.n_embd + held)
    return {"forward": {"bytes": weights + B * held * packed.cache_dtype.itemsize, "flops": flops}}
