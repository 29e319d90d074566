"""Generation: prefill the prompt once, then decode a token at a time against a key-value cache.

The cache is an object that the caller passes in, allocated once at its final size. Prompts of unequal length
are padded on the left, so that every row's next token has the same index.

`generate` goes from ids to ids, `complete` from text to text, through a `TextStream` for each sample.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.tokenizer import Tokenizer


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


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] with those of tokens already seen (bool [B, V]) divided by penalty where positive, else times it.

    Keskar et al., 2019, arXiv:1909.05858, as transformers' RepetitionPenaltyLogitsProcessor has it.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _validate(model, prompts, max_new_tokens, temperature, top_k, top_p, repetition_penalty) -> None:
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
    if not 0.0 < repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty is {repetition_penalty}; it must be above 0, and 1 changes nothing")
    longest, n_positions = max(map(len, prompts)), model.config.n_positions
    if longest + max_new_tokens > n_positions:
        raise ValueError(
            f"prompt ({longest} tokens) and new tokens ({max_new_tokens}) need {longest + max_new_tokens} positions "
            f"and the model has {n_positions}; generate fewer tokens or shorten the prompt"
        )


@torch.no_grad()
def generate(
    model: GPT2LMHeadModel,
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
) -> list[list[int]]:
    """Continues each prompt by up to max_new_tokens tokens; returns the new tokens alone.

    Args:
        prompts: token ids, of any lengths.
        temperature, top_k, top_p: see `sample`; temperature 0 is greedy.
        repetition_penalty: see `penalize_repetition`, over the prompt and what was generated; 1 is none.
        eos_token_id: ends a row, each of several does; it is not returned.
        seed: of the sampling; the same seed, prompts and machine give the same tokens.
        on_token: called with the newest token of every row, int64 [B]. It may return a bool [B]: these rows end
            here, after this token. Rows that have ended repeat their last token until all have.

    Raises:
        ValueError: an empty prompt, or prompt and new tokens beyond n_positions.
    """
    _validate(model, prompts, max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    device, longest = model.transformer.wte.weight.device, max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)], device=device)
    starts = torch.tensor(padding, dtype=torch.int32, device=device)
    mask = torch.arange(longest, device=device) >= starts.unsqueeze(1) if any(padding) else None
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    seen = None
    if repetition_penalty != 1.0:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True
    ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    ends = torch.tensor(ends, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        cache = KVCache(model, len(prompts), longest + max_new_tokens, starts)
        logits = _next_logits(model, tokens, cache, mask)
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        new_tokens: list[Tensor] = []
        for step in range(max_new_tokens):
            if seen is not None:
                logits = penalize_repetition(logits, seen, repetition_penalty)
            token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if new_tokens:
                token = torch.where(finished, new_tokens[-1], token)
            new_tokens.append(token)
            if seen is not None:
                seen.scatter_(1, token.unsqueeze(1), True)
            stopped = None if on_token is None else on_token(token)
            if len(ends):
                finished |= torch.isin(token, ends)
            lengths += ~finished
            if stopped is not None:
                finished |= stopped.to(device)
            if (len(ends) or stopped is not None) and finished.all():
                break
            if step + 1 < max_new_tokens:
                logits = _next_logits(model, token.unsqueeze(1), cache, None)
    finally:
        model.train(was_training)
    rows = torch.stack(new_tokens, 1).tolist()
    return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]


class TextStream:
    """The text of one sample as its tokens come: whole characters only, and nothing a stop string may yet begin with.

    Args:
        tokenizer: whose ids come in.
        stop: strings that end the sample; the text ends in front of the first.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("a stop string is empty; give at least one character")
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Takes one token; returns the text that is now certain, which may be none."""
        if not 0 <= token < self._tokenizer.n_vocab:
            raise ValueError(f"the model gave token {token}, outside the tokenizer's 0..{self._tokenizer.n_vocab - 1}")
        return self._take(self._characters.decode(self._tokenizer.encoding.decode_single_token_bytes(token)))

    def close(self) -> str:
        """The rest, where no more tokens come; bytes that never became a character are U+FFFD."""
        certain = self._take(self._characters.decode(b"", final=True))
        rest, self._held = self._held, ""
        self.text += rest
        return certain + rest

    def _take(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            certain, self._held, self.stopped = text[: min(found)], "", True
        else:
            held = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            certain, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += certain
        return certain


def complete(
    model: GPT2LMHeadModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    write: Callable[[str], object] | None = None,
    **sampling,
) -> list[str]:
    """Continuations of a text, num_samples of them, each up to end-of-text or the first stop string.

    Args:
        prompt: where it is empty, <|endoftext|> stands for it, as in OpenAI's unconditional samples.
        write: called with the first sample's text piece by piece, as it comes.
        sampling: temperature, top_k, top_p, repetition_penalty and seed of `generate`.

    Raises ValueError for a model whose vocabulary is not GPT-2's, and for what `generate` refuses.
    """
    if model.config.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"the model has vocab_size {model.config.vocab_size} and GPT-2's tokenizer {tokenizer.n_vocab} ids; "
            "give token ids to gpt2_fast.generate.generate"
        )
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    ids = tokenizer.encode(prompt) or [tokenizer.eot_token]
    ends = model.config.eos_token_id
    ends = {tokenizer.eot_token, *(() if ends is None else (ends,) if isinstance(ends, int) else ends)}
    streams = [TextStream(tokenizer, stop) for _ in range(num_samples)]
    finished = [False] * num_samples

    def on_token(tokens: Tensor) -> Tensor:
        for row, token in enumerate(tokens.tolist()):
            if not finished[row] and token not in ends:
                piece = streams[row].push(token)
                if row == 0 and write is not None and piece:
                    write(piece)
            finished[row] = finished[row] or streams[row].stopped or token in ends
        return torch.tensor(finished)

    generate(model, [ids] * num_samples, max_new_tokens, eos_token_id=ends, on_token=on_token, **sampling)
    rests = [stream.close() for stream in streams]
    if write is not None and rests[0]:
        write(rests[0])
    return [stream.text for stream in streams]
