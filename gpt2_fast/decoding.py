"""The loop of generation: logits from a decoder, a token a row from a sampler, until every row has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from gpt2_fast.config import GPT2Config
from gpt2_fast.decoder import Decoder, make_decoder
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.sampling import Sampler

SLIDE = "slide"


def check_lengths(config: GPT2Config, longest: int, max_new_tokens: int, context: str | None) -> None:
    """Raises ValueError where max_new_tokens after prompts of `longest` tokens cannot be had."""
    if context not in (None, SLIDE):
        raise ValueError(f"context is {context!r}; it must be {SLIDE!r}, or None to refuse what does not fit")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if context is None and longest + max_new_tokens > config.n_positions:
        raise ValueError(
            f"prompt ({longest} tokens) and new tokens ({max_new_tokens}) need {longest + max_new_tokens} positions "
            f"and the model has {config.n_positions}; generate fewer tokens, shorten the prompt, or let the context "
            f"slide: context={SLIDE!r} (--slide)"
        )


def as_ids(value: int | Collection[int] | None) -> list[int]:
    """One id, several or none, as a list."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


@torch.no_grad()
def run(
    model: GPT2LMHeadModel,
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
    was_training = model.training
    model.eval()
    try:
        return _decode(decoder, tokens, starts, max_new_tokens, sampler, tuple(ends), filler, on_token)
    finally:
        model.train(was_training)


def _next_logits(decoder: Decoder, sequence: Tensor, starts: Tensor, prompt: int) -> Tensor:
    """Logits after sequence [B, n], of which the decoder holds all but the newest token, or nothing yet.

    Where there is no room left, the newest half of n_positions is prefilled again, its positions counted from 0.
    """
    n = sequence.shape[1]
    if n == prompt and n <= decoder.n_positions:
        return decoder.prefill(sequence.contiguous(), starts)
    if n > prompt and decoder.length < decoder.n_positions:
        return decoder.step(sequence[:, -1].contiguous())
    kept = max(1, decoder.n_positions // 2)
    return decoder.prefill(sequence[:, -kept:].contiguous(), (starts - (n - kept)).clamp_(min=0))


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
    (B, T), device = tokens.shape, tokens.device
    sequence = tokens.new_empty(B, T + max_new_tokens)
    sequence[:, :T] = tokens
    end_ids = torch.tensor(ends, dtype=torch.int64, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    lengths = torch.zeros(B, dtype=torch.int64, device=device)
    for n in range(T, T + max_new_tokens):
        token = sampler.choose(_next_logits(decoder, sequence[:, :n], starts, T), n - T)
        if n > T:
            token = torch.where(finished, sequence[:, n - 1] if filler is None else filler, token)
        sequence[:, n] = token
        sampler.observe(token)
        stopped = None if on_token is None else on_token(token)
        if len(ends):
            finished |= torch.isin(token, end_ids)
        lengths += ~finished
        if stopped is not None:
            finished |= stopped.to(device)
        if (len(ends) or stopped is not None) and finished.all():
            break
    return sequence[:, T : n + 1], lengths
