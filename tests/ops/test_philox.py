"""The dropout masks' generator and coordinates, element by element from their definition."""

from __future__ import annotations

import pytest
import torch

from gpt2_fast.ops.runtime import philox

MASK = 0xFFFFFFFF
KEY = 0x299F31D0_A4093822  # digits of pi, as in Random123's vectors


def philox4x32(counter, key, rounds=7):
    """As Salmon et al. write it, in Python's own integers."""
    c, k = list(counter), [key & MASK, key >> 32 & MASK]
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & MASK, a >> 32 ^ c[3] ^ k[1], a & MASK]
        k = [k[0] + 0x9E3779B9 & MASK, k[1] + 0xBB67AE85 & MASK]
    return c


PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
VECTORS = [  # Random123, tests/kat_vectors
    (7, [0] * 4, 0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    (7, [MASK] * 4, -1, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (7, PI, KEY, [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]),
    (10, [0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (10, [MASK] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (10, PI, KEY, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), VECTORS)
def test_block_is_its_authors(rounds, counter, key, words):
    c0, c1, c2 = (torch.tensor([c]) for c in counter[:3])
    assert [int(w) for w in philox.block(torch.tensor([key]), c0, c1, c2, counter[3], rounds)] == words
    assert philox4x32(counter, key % 2**64, rounds) == words


def number(words, i):
    return words[i // 2] >> 16 * (i % 2) & 0xFFFF


def bit(x, i):
    return x >> i & 1


def in_row(row, col, site):
    return number(philox4x32([col >> 3, row, 0, site], KEY), col & 7)


def in_tile(z, row, col, site):
    counter = [(col >> 4) * 4 + (col >> 1 & 3), (row >> 4) * 8 + (row & 7), z, site]
    return number(philox4x32(counter, KEY), 4 * bit(row, 3) + 2 * bit(col, 3) + bit(col, 0))


@pytest.mark.parametrize("p", [0.1, 0.5, 1e-6, 0.9999999])
def test_masks_by_their_definition(p):
    key = torch.tensor([KEY])
    least = min(round(p * 65536), 65535)
    rows = philox.keep_rows(key, 5, 3, 21, p)
    assert rows.tolist() == [[in_row(r, c, 5) >= least for c in range(21)] for r in range(3)]
    tiles = philox.keep_tiles(key, 5, 2, 37, p)
    expected = [[[in_tile(z, r, c, 5) >= least for c in range(37)] for r in range(37)] for z in range(2)]
    assert tiles.tolist() == expected


@pytest.mark.parametrize("p", [0.1, 0.25, 0.7])
def test_expectation_is_kept(p):
    """The part that is kept is p's nearest 65536th to the noise of counting, and the scale is its inverse."""
    n = 1 << 20
    keep = philox.keep_rows(torch.tensor([1]), 0, 1024, n // 1024, p)
    assert abs(1 / philox.scale(p) - (1 - p)) <= 0.5 / 65536
    assert abs(keep.double().mean() * philox.scale(p) - 1) < 5 * (p / (1 - p) / n) ** 0.5
    # Neighbours, and those a block away, are dropped independently.
    for a, b in ((keep[:, :-1], keep[:, 1:]), (keep[:, :-8], keep[:, 8:]), (keep[:-1], keep[1:])):
        together = (~a & ~b).double().mean()
        assert abs(together - p * p) < 6 * (p * p / a.numel()) ** 0.5
