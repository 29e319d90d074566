"""Generation from text to text: whole characters as their tokens come, and strings that end it."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gpt2_fast.generate.loop import generate
from gpt2_fast.generate.protocol import Model

if TYPE_CHECKING:
    from gpt2_fast.data.characters import CharacterTokenizer
    from gpt2_fast.data.tokenizer import Tokenizer


class TextStream:
    """The text of one sample as its tokens come: whole characters, and nothing that may be the start of a stop string.

    Args:
        tokenizer: whose ids come in.
        stop: strings that end the sample; the text ends before the first.
    """

    def __init__(self, tokenizer: Tokenizer | CharacterTokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, check_stop_strings(stop)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.text, self.stopped = "", False
        self.tokens: list[int] = []

    def push(self, token: int) -> str:
        """Takes one token; returns the text that is now certain, which may be none."""
        if not 0 <= token < self._tokenizer.n_vocab:
            raise ValueError(f"the model gave token {token}, outside the tokenizer's 0..{self._tokenizer.n_vocab - 1}")
        self.tokens.append(token)
        return self._take(self._characters.decode(self._tokenizer.token_bytes(token)))

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


class StopStrings:
    """Whether the newest token of a row completes one of some strings, as transformers' StopStringCriteria says.

    Args:
        tokenizer: with `decode(ids) -> str`: this package's or transformers'.
        stop: the strings. One may begin in the prompt.
    """

    def __init__(self, tokenizer, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, check_stop_strings(stop)
        # A token is at least one byte, so no string reaches further back than this.
        self._reach = max(len(s.encode()) for s in self._stop)

    def ends(self, ids: Sequence[int]) -> bool:
        """ids: the tokens of one row, prompt and new ones; only the last few are read."""
        window = list(ids[-self._reach :])
        text = self._tokenizer.decode(window)
        # Half a character at the end of what was there before is U+FFFD until its last token comes.
        before = len(self._tokenizer.decode(window[:-1]).rstrip("\ufffd"))
        return any((at := text.rfind(stop)) >= 0 and at + len(stop) > before for stop in self._stop)


def check_stop_strings(stop: Sequence[str]) -> tuple[str, ...]:
    """As a tuple. Raises ValueError where one is empty."""
    if "" in stop:
        raise ValueError("a stop string is empty; give at least one character")
    return tuple(stop)


class Completion(NamedTuple):
    """One continuation.

    Attributes:
        text: without what ended it.
        tokens: its ids, those of a stop string among them, without the end of text.
        finish_reason: "eos_token", "stop_sequence" or "length".
    """

    text: str
    tokens: list[int]
    finish_reason: str


def complete(
    model: Model,
    tokenizer: Tokenizer | CharacterTokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    write: Callable[[str], object] | None = None,
    **sampling: Any,
) -> list[str]:
    """Continuations of a text, num_samples of them, each up to end-of-text or the first stop string.

    Args:
        prompt: where it is empty, `tokenizer.start_token` stands for it: <|endoftext|>, as in OpenAI's unconditional
            samples.
        write: called with the first sample's text piece by piece, as it comes.
        sampling: temperature, top_k, top_p, repetition_penalty, seed, context and weights of `generate`.

    Raises ValueError for a model whose vocabulary is not the tokenizer's, and for what `generate` refuses.
    """
    options = {"num_samples": num_samples, "stop": stop, "write": write, **sampling}
    return [one.text for one in completions(model, tokenizer, prompt, max_new_tokens, **options)]


def completions(
    model: Model,
    tokenizer: Tokenizer | CharacterTokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    write: Callable[[str], object] | None = None,
    **sampling: Any,
) -> list[Completion]:
    """As `complete`, with the ids of each continuation and why it ends."""
    if model.config.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"the model has vocab_size {model.config.vocab_size} and the tokenizer {tokenizer.n_vocab} ids; "
            "give token ids to gpt2_fast.generate.generate"
        )
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    ids = tokenizer.encode(prompt) or [tokenizer.start_token]
    ends = model.config.eos_token_id
    ends = {tokenizer.eot_token, *(ends if isinstance(ends, tuple) else (ends,))} - {None}
    streams = [TextStream(tokenizer, stop) for _ in range(num_samples)]
    reasons = ["length"] * num_samples

    def on_token(tokens: Tensor) -> Tensor:
        for row, token in enumerate(tokens.tolist()):
            if reasons[row] != "length":
                continue
            if token in ends:
                reasons[row] = "eos_token"
                continue
            piece = streams[row].push(token)
            if row == 0 and write is not None and piece:
                write(piece)
            if streams[row].stopped:
                reasons[row] = "stop_sequence"
        return torch.tensor([reason != "length" for reason in reasons], device="cpu")

    generate(model, [ids] * num_samples, max_new_tokens, eos_token_id=ends or None, on_token=on_token, **sampling)
    rests = [stream.close() for stream in streams]
    if write is not None and rests[0]:
        write(rests[0])
    return [Completion(s.text, s.tokens, reason) for s, reason in zip(streams, reasons, strict=True)]
