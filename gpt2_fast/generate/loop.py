"""Generation from ids to ids: logits from a decoder, a token a row from a sampler, until every row has ended."""

from __future__ import annotations

import contextlib
import numbers
import operator
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from gpt2_fast.config import GPT2Config
from gpt2_fast.generate.decoders import Decoder, PackedDecoder, make_decoder
from gpt2_fast.generate.protocol import Model
from gpt2_fast.generate.sampling import Sampler, Sampling, check_finite
from gpt2_fast.modes import evaluating

SLIDE = "slide"
AT_ONCE = 8  # tokens of a call where nobody waits for each: Ctrl-C is looked at after them


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Collection[int] | None = None,
    seed: int | None = None,
    on_token: Callable[[Tensor], Tensor | None] | None = None,
    context: str | None = None,
    weights: str | None = None,
) -> list[list[int]]:
    """Continues each prompt by up to max_new_tokens tokens; returns the new tokens alone.

    Args:
        prompts: token ids, of any lengths.
        temperature, top_k, top_p, repetition_penalty: see `Sampling`; temperature 0 is greedy.
        eos_token_id: ends a row, each of several does; it is not returned.
        seed: of the sampling; the same seed, prompt, row and machine give the same tokens.
        on_token: called with the newest token of every row, int64 [B]. It may return a bool [B]: these rows end
            here, after this token. Rows that have ended repeat their last token until all have.
        context: "slide" goes on past n_positions: where they are used up, the newest half of them is prefilled
            again with positions counted from 0. None refuses.
        weights: "float32", "bfloat16", "int8" or "int4" on a CPU, see `make_decoder`.

    Raises:
        ValueError: an empty prompt, or prompt and new tokens beyond n_positions.
        FloatingPointError: logits that are NaN or infinite; on a GPU at the end, as nothing is read before.
    """
    if not prompts or any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty; give at least one token, for example <|endoftext|>")
    device, longest = model.transformer.wte.weight.device, max(map(len, prompts))
    check_lengths(model.config, longest, max_new_tokens, context)
    options = Sampling(temperature, top_k, top_p, repetition_penalty)
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)], device=device)
    starts = torch.tensor(padding, dtype=torch.int32, device=device)
    mask = torch.arange(longest, device=device) >= starts.unsqueeze(1)
    sampler = Sampler.start(options, tokens, model.config.vocab_size, max_new_tokens, counted=mask, seed=seed)
    new, lengths = run(
        model, tokens, starts, max_new_tokens, sampler,
        ends=as_ids(eos_token_id), on_token=on_token, weights=weights,
    )  # fmt: skip
    return [row[:length] for row, length in zip(new.tolist(), lengths.tolist(), strict=True)]


def check_lengths(config: GPT2Config, longest: int, max_new_tokens: int, context: str | None) -> None:
    """Raises ValueError where max_new_tokens after prompts of `longest` tokens cannot be had."""
    if context not in (None, SLIDE):
        raise ValueError(f"context is {context!r}; it must be {SLIDE!r}, or None to refuse what does not fit")
    if not isinstance(max_new_tokens, numbers.Integral):
        raise ValueError(f"max_new_tokens is {max_new_tokens!r:.60}; it must be a whole number")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if context is None and longest + max_new_tokens > config.n_positions:
        raise ValueError(
            f"prompt ({longest} tokens) and new tokens ({max_new_tokens}) need {longest + max_new_tokens} positions "
            f"and the model has {config.n_positions}; generate fewer tokens, shorten the prompt, or let the context "
            f"slide: context={SLIDE!r} (--slide)"
        )


def as_ids(value: int | Collection[int] | None) -> list[int]:
    """One id, several or none, as a list. Raises ValueError for what is no whole number."""
    if value is None:
        return []
    with contextlib.suppress(TypeError):
        return [operator.index(value)]  # a number of NumPy's or torch's is one too
    try:
        return [operator.index(one) for one in value]
    except TypeError:
        raise ValueError(f"eos_token_id is {value!r:.60}; it must be a token id, several, or None") from None


@torch.no_grad()
def run(
    model: Model,
    tokens: Tensor,
    starts: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    *,
    ends: Collection[int] = (),
    filler: int | None = None,
    on_token: Callable[[Tensor], Tensor | None] | None = None,
    weights: str | None = None,
) -> tuple[Tensor, Tensor]:
    """New tokens int64 [B, n], n <= max_new_tokens, and how many of each row came before one of `ends`, int64 [B].

    Args:
        tokens, starts: prompts int64 [B, T] and how many positions of padding each begins with, int32 [B].
        filler: what a row that has ended goes on with; None repeats its last token.
        on_token: gets the newest token of every row, int64 [B], and may return a bool [B]: these rows end here.
        weights: see `make_decoder`.
    """
    n_positions = min(tokens.shape[1] + max_new_tokens, model.config.n_positions)
    decoder = make_decoder(model, tokens.shape[0], n_positions, weights)
    with evaluating(*decoder.calls, cached=True):
        return _decode(decoder, tokens, starts, max_new_tokens, sampler, tuple(ends), filler, on_token)


class _Rows:
    """The tokens of every row so far, which rows have ended, and how many tokens of each came before that.

    A token takes few calls of torch, which finds the caches cold after a step on a CPU (`ops.decode_step`).
    """

    def __init__(self, tokens: Tensor, ends: Sequence[int], filler: int | None):
        self.prompts, self.new, self.ends, self.filler = tokens, [], frozenset(ends), filler
        self.end_ids = torch.tensor(ends, dtype=torch.int64, device=tokens.device)
        self.finished = self.lengths = None  # Tensors [B] from the step on at which the first row ends, or may have

    def take(self, token: Tensor, on_token: Callable[[Tensor], Tensor | None] | None, observe: Callable) -> bool:
        """Adds the newest token of every row, int64 [B]; returns whether there is a row that goes on."""
        if self.finished is not None:
            token = torch.where(self.finished, self.new[-1] if self.filler is None else self.filler, token)
        self.new.append(token)
        observe(token)
        stopped = None if on_token is None else on_token(token.clone())  # theirs, whatever they do with it
        if self.finished is None:
            # Elsewhere a look at the tokens would wait for the device.
            ended = bool(self.ends) and (not token.is_cpu or not self.ends.isdisjoint(token.tolist()))
            if not ended and stopped is None:
                return True
            self.finished = torch.zeros_like(token, dtype=torch.bool)
            self.lengths = torch.full_like(token, len(self.new) - 1)
        self.finished |= torch.isin(token, self.end_ids)
        self.lengths += ~self.finished
        if stopped is not None:
            self.finished |= stopped.to(token.device)
        return not self.finished.all()

    def take_all(self, tokens: Tensor, on_token: Callable[[Tensor], Tensor | None] | None, observe: Callable) -> bool:
        """`take` for tokens int64 [n, B]; where n > 1 nobody listens, and none but the last end a row."""
        self.new += tokens[:-1].unbind()
        return self.take(tokens[-1], on_token, observe)

    def sequence(self) -> Tensor:
        """Prompts and new tokens, int64 [B, T + n]."""
        return torch.cat((self.prompts, torch.stack(self.new, 1)), 1) if self.new else self.prompts

    def counts(self) -> Tensor:
        """How many tokens of each row came before one of `ends`, int64 [B]."""
        return torch.full_like(self.prompts[:, 0], len(self.new)) if self.lengths is None else self.lengths


def _next_logits(decoder: Decoder, rows: _Rows, starts: Tensor) -> Tensor:
    """Logits after the newest token of every row; the decoder holds all before it, or nothing yet.

    Where there is no room left, the newest half of n_positions is prefilled again, its positions counted from 0.
    """
    T = rows.prompts.shape[1]
    if rows.new and decoder.length < decoder.n_positions:
        return decoder.step(rows.new[-1])
    if not rows.new and decoder.n_positions >= T:
        return decoder.prefill(rows.prompts.contiguous(), starts)
    kept, n = max(1, decoder.n_positions // 2), T + len(rows.new)
    return decoder.prefill(rows.sequence()[:, -kept:].contiguous(), (starts - (n - kept)).clamp_(min=0))


def _decode(
    decoder: Decoder,
    tokens: Tensor,
    starts: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    ends: Sequence[int],
    filler: int | None,
    on_token: Callable[[Tensor], Tensor | None] | None,
) -> tuple[Tensor, Tensor]:
    rows = _Rows(tokens, ends, filler)
    going = True
    while going and len(rows.new) < max_new_tokens:
        alone = on_token is None and rows.finished is None
        count = min(AT_ONCE if alone else 1, max_new_tokens - len(rows.new))
        going = rows.take_all(_next_tokens(decoder, rows, starts, sampler, count), on_token, sampler.observe)
    sampler.finish()
    return torch.stack(rows.new, 1), rows.counts()


def _next_tokens(decoder: Decoder, rows: _Rows, starts: Tensor, sampler: Sampler, count: int) -> Tensor:
    """The next tokens of every row, int64 [n, B], 1 <= n <= count; none but the last of them are among rows.ends."""
    step, room = len(rows.new), decoder.n_positions - decoder.length
    if step and room > 0 and isinstance(decoder, PackedDecoder):
        count = min(count, room)
        draws = sampler.draws(step, count)
        if draws is not None:
            tokens, highest = decoder.tokens(rows.new[-1], count, rows.ends, draws)
            check_finite(highest[-1])
            return tokens
    return sampler.choose(_next_logits(decoder, rows, starts), step).unsqueeze(0)
