"""Generation: prefill the prompt once, then decode a token at a time against a key-value cache.

The cache is an object that the caller passes in, allocated once at its final size. Prompts of unequal length
are padded on the left, so that every row's next token has the same index.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpt2_fast.model import GPT2LMHeadModel


class KVCache:
    """Keys and values of every layer, [L, B, H, S, D], for S positions.

    Args:
        model: its sizes, device and dtype are the cache's.
        batch_size: B.
        n_positions: S, prompt and new tokens together; at most the model's n_positions.
        starts: int32 [B], how many padding positions each row begins with.
    """

    def __init__(self, model: GPT2LMHeadModel, batch_size: int, n_positions: int, starts: Tensor | None = None):
        config, weight = model.config, model.transformer.wte.weight
        if n_positions > config.n_positions:
            raise ValueError(
                f"the cache needs {n_positions} positions and the model has {config.n_positions}; generate fewer "
                "tokens or shorten the prompt"
            )
        shape = (config.n_layer, batch_size, config.n_head, n_positions, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.starts = torch.zeros(batch_size, dtype=torch.int32, device=weight.device) if starts is None else starts
        self.lengths = torch.zeros_like(self.starts)
        self.length = 0
        self.prefilling = True

    def advance(self, n_new: int) -> int:
        """Makes room for n_new tokens of every row before a forward pass; returns the first one's index."""
        first, self.length = self.length, self.length + n_new
        self.prefilling = first == 0
        self.lengths.fill_(self.length)
        return first

    def write(self, layer: int, qkv: Tensor) -> None:
        """Stores the keys and values of qkv [B, T, 3, H, D], the newest T positions, for one layer."""
        first = self.length - qkv.shape[1]
        self.keys[layer, :, :, first : self.length] = qkv[:, :, 1].transpose(1, 2)
        self.values[layer, :, :, first : self.length] = qkv[:, :, 2].transpose(1, 2)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] of one layer."""
        return self.keys[index], self.values[index]


def _next_logits(model: GPT2LMHeadModel, input_ids: Tensor, cache: KVCache, attention_mask: Tensor | None) -> Tensor:
    """Logits [B, V], float32, of the token after the newest of input_ids [B, T]."""
    first = cache.advance(input_ids.shape[1])
    positions = torch.arange(first, cache.length, device=input_ids.device)
    position_ids = (positions - cache.starts.long().unsqueeze(1)).clamp_(min=0)
    hidden = model.transformer(input_ids, attention_mask, position_ids, cache=cache)
    return (hidden[:, -1] @ model.lm_head.weight.t()).float()


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id a row, int64 [B], from logits [B, V].

    temperature 0 takes the most likely. top_k keeps the k most likely; top_p then keeps the fewest whose
    probabilities sum to at least p (Holtzman et al., 2019, arXiv:1904.09751).
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def _validate(model, prompts, max_new_tokens, temperature, top_k, top_p) -> None:
    if not prompts or any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty; give at least one token, for example <|endoftext|>")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


@torch.no_grad()
def generate(
    model: GPT2LMHeadModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    seed: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> list[list[int]]:
    """Continues each prompt by up to max_new_tokens tokens; returns the new tokens alone.

    Args:
        prompts: token ids, of any lengths.
        temperature, top_k, top_p: see `sample`; temperature 0 is greedy.
        eos_token_id: ends a row; it is not returned.
        seed: of the sampling; the same seed, prompts and machine give the same tokens.
        on_token: called with the newest token of every row, int64 [B].

    Raises:
        ValueError: an empty prompt, or prompt and new tokens beyond n_positions.
    """
    _validate(model, prompts, max_new_tokens, temperature, top_k, top_p)
    device, longest = model.transformer.wte.weight.device, max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)], device=device)
    starts = torch.tensor(padding, dtype=torch.int32, device=device)
    mask = torch.arange(longest, device=device) >= starts.unsqueeze(1) if any(padding) else None
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        cache = KVCache(model, len(prompts), longest + max_new_tokens, starts)
        logits = _next_logits(model, tokens, cache, mask)
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        new_tokens: list[Tensor] = []
        for step in range(max_new_tokens):
            token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            new_tokens.append(token)
            if on_token is not None:
                on_token(token)
            if eos_token_id is not None:
                finished |= token == eos_token_id
                if finished.all():
                    break
            if step + 1 < max_new_tokens:
                logits = _next_logits(model, token.unsqueeze(1), cache, None)
    finally:
        model.train(was_training)
    rows = torch.stack(new_tokens, 1).tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in rows]
