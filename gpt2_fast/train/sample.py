"""The text that a run shows of its model."""

from __future__ import annotations

import sys

from gpt2_fast.data.characters import CharacterTokenizer
from gpt2_fast.data.tokenizer import Tokenizer
from gpt2_fast.generate import generate
from gpt2_fast.model import GPT2LMHeadModel


def sample_text(
    model: GPT2LMHeadModel, tokenizer: Tokenizer | CharacterTokenizer | None, max_new_tokens: int, seed: int
) -> str:
    """What follows the token that texts begin with. Without a tokenizer, what follows token 0, as ids."""
    start = 0 if tokenizer is None else tokenizer.start_token
    room = max(model.config.n_positions - 1, 1)
    tokens = generate(model, [[start]], min(max_new_tokens, room), temperature=0.8, top_k=50, seed=seed)[0]
    if tokenizer is None:
        return f"(token ids: no tokenizer of {model.config.vocab_size} tokens is known) {' '.join(map(str, tokens))}"
    return tokenizer.decode(tokens)


def sample(
    model: GPT2LMHeadModel, tokenizer: Tokenizer | CharacterTokenizer | None, max_new_tokens: int, seed: int
) -> str:
    """`sample_text` as stdout can show it; where it cannot be decoded, why: a run goes on."""
    try:
        text = sample_text(model, tokenizer, max_new_tokens, seed)
    except (ValueError, IndexError, FloatingPointError) as error:
        return f"(no sample: {error})"
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)  # what a terminal cannot show ends no run either
