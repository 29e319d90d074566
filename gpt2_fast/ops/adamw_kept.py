"""What `adamw` found of an optimizer's tensors at one step and keeps for the next: gradients alone are new then.

The contract looks at six tensors of each parameter several times, which for a small model takes longer than its update.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from gpt2_fast.ops.adamw_contract import with_masters
from gpt2_fast.ops.adamw_table import Row, table_rows
from gpt2_fast.ops.runtime.tracing import traced

_LOOKS = (type, Tensor.data_ptr, Tensor.stride, Tensor.is_neg, Tensor._is_zerotensor)
_LOOKS += tuple(map(attrgetter, ("shape", "dtype", "device")))


def _looks(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """All that the contract and the table read of a dense tensor; a sparse one has no data_ptr, and raises."""
    return [list(map(look, tensors)) for look in _LOOKS]


class Kept:
    """One call's implementation and table, for calls with the same parameters and state where they were."""

    def __init__(self):
        self._key: list[Any] | None = None

    def take(
        self, impl: str, lists, hyper: Tensor, numbers: Sequence[Tensor | None]
    ) -> tuple[str, tuple[Row, ...]] | None:
        """(implementation, table) for these gradients; None where a call is to be checked as a whole.

        lists, hyper: those of `adamw`. numbers: its tensors of one number.
        """
        if self._key is None:
            return None
        try:
            if self._key != self._key_of(impl, lists, hyper):
                return None
            grads = lists[1]
            if traced([*grads, hyper, *numbers]) or not all(map(Tensor.is_contiguous, grads)):
                return None
            starts = list(map(Tensor.data_ptr, grads))
        except (AttributeError, TypeError, RuntimeError):  # no tensors, or no dense ones: the contract says which
            return None
        like = [list(map(look, grads)) for look in map(attrgetter, ("shape", "dtype", "device"))]
        if like != self._like or self._written_over(starts):
            return None
        rows = [Row(row[0], starts[i], *row[2:]) for i, row in zip(self._numbers, self._rows, strict=True)]
        return self._chosen, tuple(rows)

    def note(self, impl: str, lists, hyper: Tensor, chosen: str) -> None:
        """Keeps what a call found that was checked as a whole; nothing of one with tensors that are no plain memory."""
        params, _, exp_avgs, exp_avg_sqs, masters, steps, _ = lists
        self._key = None
        if traced([*params, *exp_avgs, *exp_avg_sqs, *masters, *steps]):
            return
        self._key, self._chosen, self._rows = self._key_of(impl, lists, hyper), chosen, table_rows(*lists)
        self._numbers = [i for i, p in enumerate(params) if p.numel()]
        self._like = [list(map(look, params)) for look in map(attrgetter, ("shape", "dtype", "device"))]
        self._nbytes = list(map(attrgetter("nbytes"), params))
        written = [t for each in with_masters(params, masters, exp_avgs, exp_avg_sqs) for t in each if t is not None]
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in written if t.numel())
        self._starts, self._ends = [start for start, _ in spans], [end for _, end in spans]

    @staticmethod
    def _key_of(impl: str, lists, hyper: Tensor) -> list[Any]:
        params, _, exp_avgs, exp_avg_sqs, masters, steps, groups = lists
        return [
            impl,
            hyper.device,
            hyper.shape,
            list(groups),
            *map(_looks, (params, exp_avgs, exp_avg_sqs, masters, steps)),
        ]

    def _written_over(self, starts: list[int]) -> bool:
        """Whether a gradient, contiguous from its start on, lies where the step writes; what it writes is disjoint."""
        for start, nbytes in zip(starts, self._nbytes, strict=True):
            i = bisect.bisect_left(self._starts, start + nbytes) - 1
            if nbytes and i >= 0 and self._ends[i] > start:
                return True
        return False
