"""Windows of token shards as batches.

A batch is a function of (seed, step, micro_step) alone, so a run that resumes needs no state from here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from gpt2_fast.data import order as orders
from gpt2_fast.data.shards import Shard

_SAMPLES, _SAMPLE = 256, 4096  # of a fingerprint: how many, and tokens in each
CHECKED_AT_ONCE = 1 << 20  # tokens of a shard that are checked when it is opened; batches check the rest


class TokenDataset:
    """Token shards from which windows of context + 1 tokens are cut, none across two shards.

    Raises ValueError where no shard has context + 1 tokens, or a token id is not below vocab_size.
    """

    def __init__(self, shards: Sequence[Shard], *, context: int, vocab_size: int, name: str = "data"):
        if context < 1:
            raise ValueError(f"context is {context}; give a whole number of at least 1")
        self.name, self.context, self.vocab_size = name, context, vocab_size
        self.shards = [shard for shard in shards if len(shard.tokens) > context]
        if not self.shards:
            longest = max((len(shard.tokens) for shard in shards), default=0)
            raise ValueError(
                f"{name} has {longest:,} tokens in a row; a context of {context} needs {context + 1:,}: "
                "give more data or a shorter context"
            )
        for shard in self.shards:
            self._check_ids(shard, 0, shard.tokens[:CHECKED_AT_ONCE])
        self._starts = np.cumsum([len(shard.tokens) - context for shard in self.shards])
        self._windows = np.cumsum([(len(shard.tokens) - 1) // context for shard in self.shards])

    def __len__(self) -> int:
        """Tokens in all."""
        return sum(len(shard.tokens) for shard in self.shards)

    @property
    def n_windows(self) -> int:
        """How many windows `windows` has when nothing limits it."""
        return int(self._windows[-1])

    def fingerprint(self) -> str:
        """SHA-256 over the sizes of the shards and what is in them: all of a small one, of a larger one 256 samples
        of 4,096 tokens, so that it takes no longer for a terabyte. Their names do not count.
        """
        sha = hashlib.sha256()
        for shard in self.shards:
            size = len(shard.tokens)
            sha.update(f"{size} ".encode())
            whole = size <= _SAMPLES * _SAMPLE
            starts = (
                range(0, size, _SAMPLE) if whole else (i * (size - _SAMPLE) // (_SAMPLES - 1) for i in range(_SAMPLES))
            )
            for start in starts:
                sha.update(shard.tokens[start : start + _SAMPLE].astype("<u2").tobytes())
        return sha.hexdigest()

    def batch(
        self,
        step: int,
        micro_step: int = 0,
        *,
        batch_size: int,
        seed: int = 0,
        order: str = "random",
        grad_accum: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The windows of one micro-step of training: (input_ids, labels), each int64 [B, T], contiguous.

        labels are already the next tokens: labels[b, t] follows input_ids[b, t] in the data. With several processes,
        give each its own micro_step.

        Args:
            order: "random": every start is equally likely, drawn by Philox from (seed, step, micro_step) only.
                "epoch": the windows of `windows`, each once an epoch, in another order every epoch, see
                data/order.py. Window (step * grad_accum + micro_step) * batch_size + b of the run is row b.
            grad_accum: micro-steps of a step, over all processes; "random" does not depend on it.

        Raises ValueError for another order.
        """
        if order == "epoch":
            first = (step * grad_accum + micro_step) * batch_size
            return self._gather(map(self._window, orders.picks(first, batch_size, self.n_windows, seed)))
        if order != "random":
            raise ValueError(f"order is {order!r}; choose {' or '.join(orders.ORDERS)}")
        key = np.array([seed % 2**64, step], dtype=np.uint64)
        counter = np.array([0, 0, 0, micro_step], dtype=np.uint64)
        # Raw words and a remainder: NumPy may change how it draws from a range, never Philox itself.
        words = np.random.Philox(key=key, counter=counter).random_raw(batch_size)
        picks = (words % np.uint64(self._starts[-1])).astype(np.int64)
        return self._gather(self._locate(pick, self._starts) for pick in picks)

    def windows(self, *, batch_size: int, limit: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Fixed windows that do not overlap, for validation: batches as those of `batch`, the last may be smaller.

        limit: at most so many windows, evenly spaced over the data; the same ones every time.
        """
        count = self.n_windows if limit is None else min(limit, self.n_windows)
        picks = [i * self.n_windows // count for i in range(count)]
        for start in range(0, count, batch_size):
            yield self._gather(map(self._window, picks[start : start + batch_size]))

    def _window(self, pick: int) -> tuple[int, int]:
        """Shard and start of a window of `windows`: their inputs do not overlap, and what is left of a shard that
        fills none, less than context tokens and one label, is in none."""
        shard, window = self._locate(pick, self._windows)
        return shard, window * self.context

    def _locate(self, pick: int, ends: np.ndarray) -> tuple[int, int]:
        shard = int(np.searchsorted(ends, pick, side="right"))
        return shard, int(pick) - (int(ends[shard - 1]) if shard else 0)

    def _gather(self, places: Iterable[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows, read = [], {}
        for index, start in places:
            shard = self.shards[index]
            if index not in read:
                shard.check_unchanged()
            read[index] = shard
            rows.append(shard.tokens[start : start + self.context + 1])
            self._check_ids(shard, start, rows[-1])
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # [B, T + 1]
        for shard in read.values():
            shard.check_unchanged()  # nor meanwhile
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _check_ids(self, shard: Shard, start: int, tokens: np.ndarray) -> None:
        if tokens.max() >= self.vocab_size:
            position = int(np.argmax(tokens >= self.vocab_size))
            path = shard.source or shard.path
            raise ValueError(
                f"{path} has token id {tokens[position]} at position {start + position:,} of this part, "
                f"outside the model's vocabulary of {self.vocab_size}; is it data of another tokenizer?"
            )
