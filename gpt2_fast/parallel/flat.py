"""Parameters laid end to end in one buffer, which is cut into chunks and, for W processes, into W shards.

Where a parameter begins, and where a chunk does, depends on the model alone. A shard is a whole number of chunks, so
what is computed chunk by chunk is the same for every W. After the last parameter come zeros, up to W equal shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpt2_fast.ops.adamw import CHUNK

ALIGNMENT = 64  # elements: a parameter begins where torch would begin it, at 64 bytes or a multiple


class Piece(NamedTuple):
    """What of one parameter lies in a range of the buffer: its elements start .. stop, from `at` in the range on."""

    index: int
    start: int
    stop: int
    at: int


class Layout:
    """Where each of several parameters lies.

    Args:
        numels: of the parameters.
        world: how many shards there are.

    Attributes:
        offsets: where each parameter begins.
        chunks: how many chunks have a parameter's elements in them.
        shard, length: elements of one shard, and of all.
    """

    def __init__(self, numels: Sequence[int], world: int):
        self.numels, self.offsets, end = list(numels), [], 0
        for n in numels:
            self.offsets.append(end)
            end += -(-n // ALIGNMENT) * ALIGNMENT
        self.chunks = max(-(-end // CHUNK), 1)
        self.shard = -(-self.chunks // world) * CHUNK
        self.length = self.shard * world

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The parts of parameters in the elements start .. stop of the buffer, in order."""
        for index, (offset, n) in enumerate(zip(self.offsets, self.numels, strict=True)):
            first, last = max(offset, start), min(offset + n, stop)
            if first < last:
                yield Piece(index, first - offset, last - offset, first - start)
