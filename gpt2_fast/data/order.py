"""The order of an epoch: every window of a corpus once, shuffled by a seed, with no list of them kept.

A shuffle is a permutation that is computed index by index: a Feistel network (Luby, Rackoff 1988) over the smallest
number of bits that holds all indices. A number is cut into halves l, r, and each round replaces one of them,

    l = l ^ F(r)    then    r = r ^ F(l),

which can be undone whatever F is: so the network is a bijection of [0, 2^bits). F is Philox2x32 (Salmon et al., SC
2011) under a key of the round. A result that is no index goes through the network again until it is one (cycle
walking, Black, Rogaway 2002), which keeps the bijection and takes fewer than two passes on average.
"""

from __future__ import annotations

import functools

import numpy as np

ORDERS = ("random", "epoch")  # how `TokenDataset.batch` picks its windows
FEISTEL_ROUNDS = 8  # more than the 6 that resist any number of queries (Patarin 2004): halves may be of 2 bits
PHILOX_ROUNDS = 7  # as of ops/runtime/philox.py
FEWEST_BITS = 4  # networks over fewer make some permutations more often than others
_M, _W, _LOW = np.uint64(0xD256D193), 0x9E3779B9, np.uint64(0xFFFFFFFF)


def shuffled(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a shuffle of `size` puts each index: a bijection of [0, size), another for every (seed, epoch).

    Args:
        index: integers in [0, size), of any shape.
        size: up to 2^62. Memory and time do not depend on it.
        seed: any integer; its lowest 64 bits count.
        epoch: at least 0.

    Returns int64 of index's shape. Raises ValueError for an index outside of [0, size).
    """
    index = np.asarray(index)
    if not 1 <= size <= 2**62:
        raise ValueError(f"a shuffle of {size} has no order; it takes 1 to 2^62")
    if index.size and not (index.min() >= 0 and index.max() < size):
        raise ValueError(f"an index is outside of 0 .. {size - 1}")
    if size == 1:
        return np.zeros(index.shape, np.int64)
    bits, keys = max((size - 1).bit_length(), FEWEST_BITS), _round_keys(seed % 2**64, epoch)
    found = _network(index.astype(np.uint64).ravel(), bits, keys)
    while len(outside := np.flatnonzero(found >= np.uint64(size))):
        found[outside] = _network(found[outside], bits, keys)
    return found.astype(np.int64).reshape(index.shape)


def picks(first: int, count: int, size: int, seed: int) -> np.ndarray:
    """The windows of numbers first .. first + count - 1 in a run over epochs of `size` windows: int64 [count].

    Number i is place i % size of epoch i // size: where one epoch ends the next follows.
    """
    parts, end = [], first + count
    while first < end:
        epoch, place = divmod(first, size)
        length = min(size - place, end - first)
        parts.append(shuffled(np.arange(place, place + length, dtype=np.uint64), size, seed, epoch))
        first += length
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


@functools.lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """32 bits a round, from a counter that `TokenDataset.batch` of random windows never uses."""
    stream = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, 2**64 - 1], np.uint64))
    return tuple(int(word) >> 32 for word in stream.random_raw(FEISTEL_ROUNDS))


def _network(x: np.ndarray, bits: int, keys: tuple[int, ...]) -> np.ndarray:
    """The Feistel network over `bits` bits of x, uint64 [N]."""
    low = bits - bits // 2
    widths = (np.uint64(2 ** (bits - low) - 1), np.uint64(2**low - 1))
    halves = [x >> np.uint64(low), x & widths[1]]
    for i, key in enumerate(keys):
        side = i & 1
        halves[side] = halves[side] ^ (_philox(halves[1 - side], i, key) & widths[side])
    return (halves[0] << np.uint64(low)) | halves[1]


def _philox(x: np.ndarray, counter: int, key: int) -> np.ndarray:
    """A word of Philox2x32 of the counters (x, counter): uint64 [N], of which 32 bits are used."""
    left, right = x, np.uint64(counter)
    for i in range(PHILOX_ROUNDS):
        product = left * _M
        left = (product >> np.uint64(32)) ^ right ^ np.uint64((key + i * _W) % 2**32)
        right = product & _LOW
    return left
