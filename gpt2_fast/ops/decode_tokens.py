"""decode_tokens: several tokens of every row, one after another, each drawn from the logits after the one before.

    logits = decode_step(token);  token = draw(logits)        at most `count` times

The tokens are those of `decode_step` and `draw` in turn. On a CPU it is one call into C++: a step reads more weights
than the processor's caches hold, so what Python and torch do between two of them finds nothing of theirs there.
"""

from __future__ import annotations

import numbers
from collections.abc import Collection

import torch
from torch import Tensor

from gpt2_fast.ops import decode_step, draw
from gpt2_fast.ops.decode_step import check_out, check_tokens
from gpt2_fast.ops.draw import Scratch, check_options, check_uniforms, draw_reference, options_of
from gpt2_fast.ops.packed_model import PackedCache, PackedModel
from gpt2_fast.ops.runtime import cpp, dispatch

OP = "decode_tokens"
dispatch.TABLE[OP] = {"cuda": ("reference",), "cpu": ("cpp", "reference")}


def decode_tokens_reference(
    packed: PackedModel, tokens: Tensor, cache: PackedCache, count: int, uniforms, ends, out=None, **options
) -> tuple[Tensor, Tensor]:
    """What is correct: see `decode_tokens`. The steps are those of `packed.impl`."""
    made, highest = [], []
    for i in range(count):
        logits = packed.step(made[-1] if made else tokens, cache, out)
        token, high = draw_reference(logits, None if uniforms is None else uniforms[i], **options)
        made.append(token)
        highest.append(high)
        if not high.isfinite().all() or not set(ends).isdisjoint(token.tolist()):
            break
    return torch.stack(made), torch.stack(highest)


def decode_tokens(
    packed: PackedModel,
    tokens: Tensor,
    cache: PackedCache,
    count: int,
    *,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    ends: Collection[int] = (),
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Makes up to `count` tokens of every row. No gradient.

    Args:
        packed: the weights.
        tokens: int64 [B] on the CPU, the newest of every row, which the cache does not hold yet.
        cache: holds what comes before them; grows by a position for each token that is made.
        count: at least 1.
        uniforms: float64 [count, B] in [0, 1), or None: the most likely tokens; the options are not looked at then.
        temperature, top_k, top_p: see `draw`.
        ends: tokens after which nothing more is made, of any row.
        scratch: see `Scratch`; None: memory of the call's own.
        out: see `PackedModel.step`; the logits that the last tokens were drawn from.

    Returns:
        Tokens int64 [n, B], 1 <= n <= count, and the largest logits that they were drawn from, float32 [n, B]. Fewer
        than `count` where a token is one of `ends`, or a largest logit no number; that token means nothing.

    Raises what `decode_step` and `draw` raise, before anything is computed.
    """
    if not isinstance(count, numbers.Integral) or count < 1:
        raise ValueError(f"{OP}: count is {count!r:.60}; it must be a whole number, at least 1")
    if isinstance(tokens, Tensor) and tokens.ndim != 1:
        raise ValueError(f"{OP}: tokens is {tuple(tokens.shape)}; it must be one token a row, [B]")
    check_tokens(OP, packed, tokens, cache, count)
    check_out(OP, packed, cache, out)
    if uniforms is not None:
        check_uniforms(OP, "uniforms", uniforms, (count, cache.batch_size), tokens.device)
        check_options(OP, temperature, top_k, top_p)
    if wrong := [end for end in ends if not isinstance(end, numbers.Integral)]:
        raise ValueError(f"{OP}: ends has {wrong[0]!r:.60}; each must be a whole number")
    options = {} if uniforms is None else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if packed.impl == "reference":
        return decode_tokens_reference(packed, tokens, cache, count, uniforms, ends, out, **options)
    scratch = Scratch() if scratch is None else scratch
    return _decode_tokens_cpp(packed, tokens, cache, count, uniforms, ends, out, scratch, options)


def _decode_tokens_cpp(packed, tokens, cache, count, uniforms, ends, out, scratch: Scratch, options):
    B, V = cache.batch_size, packed.config.vocab_size
    logits = torch.empty(B, V, dtype=torch.float32, device="cpu") if out is None else out
    memory, draw_threads = scratch.of(B, V)
    all_tokens = torch.empty(count + 1, B, dtype=torch.int64, device="cpu")
    made = torch.empty(1, dtype=torch.int64, device="cpu")
    highest = torch.empty(count, B, dtype=torch.float32, device="cpu")
    all_tokens[0] = tokens
    cpp.decode_tokens(
        options_of(V, **options), model=packed._table, cache=cache._table, sequences=cache.sequences, B=B, V=V,
        first=cache.length, tokens=all_tokens, count=count, n_ends=len(ends), logits=logits, highest=highest,
        ends=torch.tensor([*ends], dtype=torch.int64, device="cpu"), scratch=memory, threads=cache.threads,
        draw_threads=draw_threads,
        uniforms=None if uniforms is None else uniforms.detach().resolve_neg().contiguous(), made=made,
    )  # fmt: skip
    torch.autograd.graph.increment_version(logits)
    n = made.item()
    cache.length += n
    return all_tokens[1 : n + 1], highest[:n]


def samples():
    """Sizes (fields of GPT2Config), tokens [B, T], starts [B] and options of a draw that tests read, smallest first."""
    for sizes, tokens, starts in decode_step.samples():
        for options in ({}, {"temperature": 0.8, "top_k": 20}, {"temperature": 1.3, "top_p": 0.9}):
            yield sizes, tokens, starts, options


def cost(packed: PackedModel, B: int, length: int) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one token of B rows that hold `length` positions: a step and a draw."""
    step, drawn = decode_step.cost(packed, B, length)["forward"], draw.cost(B, packed.config.vocab_size)["forward"]
    return {"forward": {key: step[key] + drawn[key] for key in step}}
