"""From logits to the next token: what is penalised, what is kept, and how it is drawn.

With a seed each row has random numbers of its own, Philox words of (seed, row, step): they depend neither on the other
rows nor on how many there are. Logits do, in float16 and on a GPU, in their last bits. Without one they come from
torch's generator as transformers draws them, so that after `torch.manual_seed` both draw the same tokens.
"""

from __future__ import annotations

import dataclasses
import math
import numbers

import torch
from torch import Tensor

from gpt2_fast.ops.draw import Scratch, cooled, draw, kept
from gpt2_fast.ops.runtime import philox

FEW = 512  # most likely tokens among which top_p is looked for first


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises ValueError, one line, for a value that means nothing.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps the k most likely; None keeps all.
        top_p: then keeps the fewest whose probabilities sum to at least p (Holtzman et al., 2019, arXiv:1904.09751).
        repetition_penalty: see `penalize_repetition`; 1 is none.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and (not isinstance(value, numbers.Real) or isinstance(value, bool)):
                raise ValueError(f"{name} is {value!r:.60}; it must be a number")
        if self.top_k is not None and not isinstance(self.top_k, numbers.Integral):
            raise ValueError(f"top_k is {self.top_k!r}; it must be a whole number")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0, and 1 changes nothing"
            )


def check_seed(seed: int | None) -> None:
    """Raises ValueError for a seed that does not fit 64 bits; any that torch takes does."""
    if seed is not None and not isinstance(seed, numbers.Integral):
        raise ValueError(f"seed is {seed!r:.60}; it must be a whole number")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be from -2^63 to 2^64 - 1")


class Sampler:
    """Chooses the next token of every row, step after step.

    Args:
        options: see `Sampling`.
        seen: bool [B, V], the tokens that repetition_penalty counts as said; updated here. None: no penalty.
        uniforms: float64 [steps, B] of `row_uniforms`, or None: torch's generator.
        generator: instead of torch's default one.
    """

    def __init__(
        self,
        options: Sampling,
        seen: Tensor | None = None,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
    ):
        self.options, self.seen, self.uniforms, self.generator = options, seen, uniforms, generator
        self.highest: Tensor | None = None  # on a GPU, float32 [B] over all steps; NaN, where one was
        self._scratch = Scratch()

    @classmethod
    def start(
        cls,
        options: Sampling,
        tokens: Tensor,
        vocab_size: int,
        n_steps: int,
        *,
        counted: Tensor | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Sampler:
        """For prompts int64 [B, T]; counted: bool [B, T], the tokens that count as said, None all of them.

        Raises ValueError where seed and generator are both given.
        """
        if seed is not None and generator is not None:
            raise ValueError("seed and generator are both given; pass one")
        check_seed(seed)
        n_rows, device, seen = tokens.shape[0], tokens.device, None
        if options.repetition_penalty != 1.0:
            said = torch.ones_like(tokens) if counted is None else counted.long()
            seen = said.new_zeros(n_rows, vocab_size).scatter_add_(1, tokens, said) > 0
        draws = seed is not None and options.temperature > 0
        return cls(options, seen, row_uniforms(seed, n_steps, n_rows, device) if draws else None, generator)

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """Token ids, int64 [B], from logits [B, V]; step counts from 0.

        Raises FloatingPointError where the largest logit of a row is no number. On a GPU, where that would be waited
        for, `finish` does.
        """
        largest = None
        if not logits.is_cpu or (self.options.temperature != 0.0 and self.uniforms is None):
            largest = logits.amax(-1).float()  # before a generator is asked, which fails in words of its own
            self._look(largest)
        if self.seen is not None:
            logits = penalize_repetition(logits, self.seen, self.options.repetition_penalty)
        uniform = None if self.uniforms is None else self.uniforms[step]
        tokens, found = _sample(logits, self.options, self.generator, uniform, self._scratch)
        if largest is None:
            self._look(found)
        return tokens

    def draws(self, step: int, count: int) -> dict | None:
        """How `ops.decode_tokens` draws `count` tokens from `step` on; None where torch has to draw each of them."""
        o = self.options
        if self.seen is not None or (o.temperature != 0.0 and self.uniforms is None):
            return None
        uniforms = None if o.temperature == 0.0 else self.uniforms[step : step + count]
        return {"uniforms": uniforms, "temperature": o.temperature, "top_k": o.top_k, "top_p": o.top_p}

    def _look(self, largest: Tensor) -> None:
        if largest.is_cpu:
            check_finite(largest)
        else:
            self.highest = largest if self.highest is None else torch.maximum(self.highest, largest)

    def finish(self) -> None:
        """Raises FloatingPointError where a row's largest logit was no number at any step, on a GPU."""
        if self.highest is not None:
            check_finite(self.highest)

    def observe(self, token: Tensor) -> None:
        """Counts the tokens int64 [B], one a row, as said."""
        if self.seen is not None:
            self.seen.scatter_(1, token.unsqueeze(1), True)


def row_uniforms(seed: int, n_steps: int, n_rows: int, device: torch.device | str) -> Tensor:
    """Uniform numbers in [0, 1), float64 [n_steps, n_rows]: one Philox word for each (seed, row, step)."""
    key = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=device)
    step, row = torch.arange(n_steps, device=device).unsqueeze(1), torch.arange(n_rows, device=device)
    return philox.block(key, step, row, torch.zeros_like(row), 0, rounds=10)[0].double() / 2.0**32


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """One token id a row, int64 [B], from logits [B, V]: see `Sampling`.

    uniform: float64 [B] in [0, 1), where in the cumulated probabilities each row's token lies; without it the token
    is drawn with the generator.
    """
    return _sample(logits, Sampling(temperature, top_k, top_p), generator, uniform, None)[0]


def _sample(logits, o: Sampling, generator, uniform, scratch: Scratch | None) -> tuple[Tensor, Tensor | None]:
    """The tokens, and the largest logit of each row where it was looked for."""
    if o.temperature == 0.0 or uniform is not None:
        uniform = None if o.temperature == 0.0 else uniform
        return draw(logits, uniform, temperature=o.temperature, top_k=o.top_k, top_p=o.top_p, scratch=scratch)
    probabilities = _kept(cooled(logits, o.temperature), o.top_k, o.top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1), None


def _kept(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """`ops.draw.kept`, on a CPU without a sort of the whole vocabulary where that can be."""
    if top_p is None or top_p >= 1.0 or logits.device.type != "cpu" or logits.dtype != torch.float32:
        return kept(logits, top_k, top_p)  # a device would be waited for
    few, told = _nucleus_of_few(logits, None if top_k is None or top_k >= logits.shape[-1] else top_k, top_p)
    # Row by row: what one keeps does not depend on the others.
    return few if told.all() else torch.where(told.unsqueeze(1), few, kept(logits, top_k, top_p))


def _nucleus_of_few(logits: Tensor, top_k: int | None, top_p: float) -> tuple[Tensor, Tensor]:
    """What `kept` returns, from the most likely tokens alone: to sort all of GPT-2's takes longer than a step.

    And in which rows that tells, bool [B]: not where further tokens are as likely as the top_k-th, or where FEW have
    less than top_p together.
    """
    values, order = logits.topk(min(top_k or FEW, logits.shape[-1]))
    if top_k is None:
        probabilities = logits.softmax(-1).gather(1, order)
        told = probabilities.cumsum(-1)[:, -1] >= top_p
    else:
        probabilities = values.softmax(-1)
        told = (logits >= values[:, -1:]).sum(-1) == top_k
    beyond = probabilities.cumsum(-1) - probabilities >= top_p
    beyond[:, 0] = False
    values = values.masked_fill(beyond, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter_(1, order, values), told


def check_finite(highest: Tensor) -> None:
    """Raises FloatingPointError, one line, where the largest logit of a row, float32 [B], is no number."""
    for row, value in enumerate(highest.tolist()):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the logits of row {row} are {'NaN' if math.isnan(value) else 'infinite'} and no token can be chosen; "
                "look for NaN or inf in the weights, or generate in float32"
            )


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] with those of tokens already seen (bool [B, V]) divided by penalty where positive, else times it.

    Keskar et al., 2019, arXiv:1909.05858, as transformers' RepetitionPenaltyLogitsProcessor has it.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
