"""The order in which the M micro-batches of a step are added: one binary tree, the same for any number of processes.

Floating-point sums depend on their order, so the order must not depend on who adds. A node over n leaves is

    n even  the left half + the right half
    n odd   the first 2^k leaves + the rest, 2^k the largest power of two below n

So with W a power of two that divides M, each of W equal blocks of leaves is a whole subtree: a process adds up its own
block, and the W sums are added pair by pair.
"""

from __future__ import annotations

from torch import Tensor


def split(n: int) -> int:
    """How many of n leaves, n at least 2, are in the left subtree."""
    return n // 2 if n % 2 == 0 else 1 << (n - 1).bit_length() - 1


def merges(i: int, n: int) -> int:
    """How many nodes of the tree over n leaves are complete as soon as leaf i is there.

    With a stack of partial sums: push leaf i, then so many times add the last two.
    """
    count = 0
    while n > 1:
        left = split(n)
        if i < left:
            n, count = left, 0
        else:
            count = count + 1 if i == n - 1 else 0
            i, n = i - left, n - left
    return count


def depth(n: int) -> int:
    """The most partial sums that are kept at a time, where a leaf is added as soon as its neighbour is there."""
    return max((n - 1).bit_length(), 1)


def total(values: Tensor) -> Tensor:
    """The sum of values [n, ...] over its first dimension, in the order of the tree. Writes over `values`."""
    odd = len(values)
    while odd % 2 == 0:
        odd //= 2
    blocks = values.view(-1, odd, *values.shape[1:])
    sums = _block(blocks)
    while len(sums) > 1:
        sums = sums[0::2].add_(sums[1::2])
    return sums[0]


def _block(values: Tensor) -> Tensor:
    """values [blocks, n, ...] added over n, in the order of the tree over n leaves."""
    n = values.shape[1]
    if n == 1:
        return values[:, 0]
    left = split(n)
    return _block(values[:, :left]).add_(_block(values[:, left:]))


def balanced(values: Tensor) -> Tensor:
    """The sum of values [n] pair by pair, padded with zeros to a power of two.

    torch.sum adds in an order that depends on the number of threads.
    """
    n = 1 << max(len(values) - 1, 0).bit_length()
    padded = values.new_zeros(n)
    padded[: len(values)] = values
    return total(padded)
