"""`GPT2LMHeadModel.generate`: a padded batch of ids in and out, with the arguments of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2_fast.compat import refuse_others
from gpt2_fast.config import GPT2Config
from gpt2_fast.generate.loop import as_ids, check_lengths, run
from gpt2_fast.generate.protocol import Model
from gpt2_fast.generate.sampling import Sampler, Sampling
from gpt2_fast.generate.text import StopStrings

DEFAULT_NEW_TOKENS = 20  # as in transformers, where neither max_new_tokens nor max_length is given

# What transformers' generate also takes, and the values besides None that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "num_beams": (1,), "num_beam_groups": (1,), "use_cache": (True, False), "min_length": (0,), "min_new_tokens": (0,),
    "typical_p": (1.0,), "min_p": (0.0,), "length_penalty": (1.0,), "no_repeat_ngram_size": (0,),
} | dict.fromkeys((
    "early_stopping", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
    "return_dict_in_generate", "renormalize_logits", "remove_invalid_values",
), (False,)) | dict.fromkeys((
    "inputs_embeds", "position_ids", "token_type_ids", "past_key_values", "cache",
    "cache_implementation", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
    "synced_gpus", "assistant_model", "prompt_lookup_num_tokens", "penalty_alpha", "bad_words_ids", "force_words_ids",
    "constraints", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "bos_token_id", "guidance_scale", "max_time", "custom_generate", "epsilon_cutoff",
    "eta_cutoff",
), ())  # fmt: skip


def _starts_from(input_ids: Tensor, attention_mask: Tensor | None, pad: int | None, ends: Collection[int]) -> Tensor:
    """How many positions of padding each row begins with, int32 [B]."""
    name = "attention_mask"
    if attention_mask is None:
        if pad is None or pad in ends:
            return torch.zeros(input_ids.shape[0], dtype=torch.int32, device=input_ids.device)
        # As transformers: pad_token_id in the prompt is padding, where it is no end of text as well.
        attention_mask, name = input_ids != pad, "input_ids != pad_token_id"
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask is a {type(attention_mask).__name__}; it must be a tensor [batch, time]")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}")
    real = attention_mask.to(input_ids.device) != 0
    if not real[:, -1].all() or (real[:, 1:] < real[:, :-1]).any():
        raise ValueError(f"{name} has padding after a token; pad on the left: tokenizer.padding_side = 'left'")
    return (~real).sum(1).to(torch.int32)


def _new_tokens(
    config: GPT2Config, length: int, max_new_tokens: int | None, max_length: int | None, context: str | None
) -> int:
    """How many tokens to add to prompts of `length`."""
    if max_new_tokens is not None:
        return max_new_tokens
    if max_length is None:
        room = config.n_positions - length
        return min(DEFAULT_NEW_TOKENS, room) if context is None and room > 0 else DEFAULT_NEW_TOKENS
    if max_length <= length:
        raise ValueError(f"max_length is {max_length} and the prompt has {length} tokens; raise it, or max_new_tokens")
    return max_length - length


def generate_batch(
    model: Model,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Collection[int] | str | None = "config",
    pad_token_id: int | None = None,
    num_return_sequences: int = 1,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    context: str | None = None,
    weights: str | None = None,
    **others,
) -> Tensor:
    """Prompts and what follows them, int64 [B * num_return_sequences, T + new], as transformers' `generate`.

    Args:
        input_ids: int64 [B, T]; rows of unequal length are padded on the left.
        attention_mask: [B, T], 0 for padding. Without it pad_token_id is padding, if it is given and ends no text.
        max_new_tokens, max_length: of new tokens, or of prompt and new tokens; 20 new ones unless given.
        do_sample: False takes the most likely token, and temperature, top_k and top_p are not looked at.
        temperature, top_k, top_p, repetition_penalty: see `Sampling`; top_k 0 or None keeps all. The penalty counts
            the prompt and what is said, padding not, as in transformers 5.
        eos_token_id: ends a row; by default the config's, None: nothing does.
        pad_token_id: follows the end of a row; by default the config's, else the first end.
        num_return_sequences: samples of each prompt; they lie next to each other.
        stop_strings, tokenizer: a row ends with the token that completes one of these strings.
        streamer: gets `put(input_ids)`, `put(token)` for each new token [B], on the CPU, then `end()`.
        seed: the same seed, prompt, row and machine give the same tokens. Without it or a generator, torch's own
            random numbers are drawn in transformers' order.
        context, weights: see `generate`.

    Raises:
        ValueError: what does not fit, in one line; what only transformers does, naming it.
        FloatingPointError: logits that are NaN or infinite.
        TypeError: an argument that nobody has.
    """
    refuse_others("generate", _NEUTRAL, others)
    if (input_ids is None) == (inputs is None):
        raise ValueError("input_ids and inputs, transformers' other name for it: pass one of the two")
    input_ids = inputs if input_ids is None else input_ids
    _check_batch(model, input_ids, do_sample, num_return_sequences, temperature)
    config = model.config
    ends = as_ids(config.eos_token_id if eos_token_id == "config" else eos_token_id)
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    starts = _starts_from(input_ids, attention_mask, pad, ends)
    max_new_tokens = _new_tokens(config, input_ids.shape[1], max_new_tokens, max_length, context)
    check_lengths(config, input_ids.shape[1], max_new_tokens, context)
    stops = _stop_strings(stop_strings, tokenizer)
    input_ids, starts = (t.repeat_interleave(num_return_sequences, 0) for t in (input_ids, starts))
    counted = torch.arange(input_ids.shape[1], device=input_ids.device) >= starts.unsqueeze(1)
    options = Sampling(repetition_penalty=repetition_penalty, temperature=0.0)
    if do_sample:
        options = Sampling(temperature, top_k or None, top_p, repetition_penalty)
    sampler = Sampler.start(
        options, input_ids, config.vocab_size, max_new_tokens, counted=counted, seed=seed, generator=generator
    )
    listens = streamer is not None or stops is not None
    new, _ = run(
        model, input_ids, starts, max_new_tokens, sampler, ends=ends, weights=weights,
        filler=pad if pad is not None else ends[0] if ends else None,
        on_token=_Listener(input_ids, streamer, stops) if listens else None,
    )  # fmt: skip
    if streamer is not None:
        streamer.end()
    return torch.cat((input_ids, new), 1)


def _check_batch(model, input_ids: Tensor, do_sample: bool, num_return_sequences: int, temperature: float) -> None:
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"input_ids is a {type(input_ids).__name__}; it must be an int64 tensor [batch, time]: torch.tensor(...)"
        )
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids is {input_ids.dtype} {tuple(input_ids.shape)}; it must be int64 [batch, time], neither 0"
        )
    device = model.transformer.wte.weight.device
    if input_ids.device != device:
        raise ValueError(f"input_ids is on {input_ids.device} and the model on {device}; move one")
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences is {num_return_sequences}; it must be at least 1")
    if num_return_sequences > 1 and not do_sample:
        raise ValueError(
            f"num_return_sequences is {num_return_sequences} and do_sample False: they would all be the same; "
            "pass do_sample=True"
        )
    if do_sample and temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}; with do_sample=True it must be above 0 (greedy: do_sample=False)"
        )


def _stop_strings(stop_strings: str | Sequence[str] | None, tokenizer) -> StopStrings | None:
    if not stop_strings:
        return None
    if tokenizer is None:
        raise ValueError("stop_strings needs the tokenizer: pass tokenizer=")
    return StopStrings(tokenizer, [stop_strings] if isinstance(stop_strings, str) else stop_strings)


class _Listener:
    """Gives tokens to a streamer as they come, and says which rows a stop string ends."""

    def __init__(self, input_ids: Tensor, streamer, stops: StopStrings | None):
        self.streamer, self.stops = streamer, stops
        self.rows = input_ids.tolist()
        if streamer is not None:
            streamer.put(input_ids.cpu())

    def __call__(self, token: Tensor) -> Tensor | None:
        token = token.cpu()
        if self.streamer is not None:
            self.streamer.put(token)
        if self.stops is None:
            return None
        for row, i in zip(self.rows, token.tolist(), strict=True):
            row.append(i)
        return torch.tensor([self.stops.ends(row) for row in self.rows], device="cpu")
