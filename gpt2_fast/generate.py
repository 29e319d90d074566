"""Generation from ids to ids and from text to text. `GPT2LMHeadModel.generate` is in `generate_batch`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from gpt2_fast.decoding import as_ids, check_lengths, run
from gpt2_fast.kv_cache import KVCache
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.sampling import Sampler, Sampling, sample
from gpt2_fast.text_stream import TextStream
from gpt2_fast.tokenizer import Tokenizer

__all__ = ["KVCache", "TextStream", "complete", "generate", "sample"]


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
        weights: "float32", "bfloat16" or "int8" on a CPU, see `make_decoder`.

    Raises:
        ValueError: an empty prompt, or prompt and new tokens beyond n_positions.
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
        sampling: temperature, top_k, top_p, repetition_penalty, seed, context and weights of `generate`.

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
