"""Dropout masks from Philox4x32-7: the same function of (key, site, coordinates) in every backend.

Philox (Salmon et al., SC 2011) is a counter-based generator: a mask is computed from where an element is, not
from what was drawn before it. So the reference, the C++ kernels (``csrc/philox.h``) and the Triton kernels
(``kernels/philox.py``) drop the same elements to the bit, the backward pass recomputes the mask instead of
storing it, and a resumed run repeats. Seven rounds pass TestU01's BigCrush. Of tests longer than that the authors have
seen suspicious p-values, which still longer ones did not confirm, and of eight or more rounds no flaw (Random123,
philox.h): enough for masks; sampling takes ten.

An element has coordinates (z, row, col) within the dropout `site` (which dropout of the model this is). Eight share
a block, whose four words are eight numbers of 16 bits, the low half of a word first; an element is kept where its
number is at least p in 65536ths, and then divided by the part that is kept. Which eight:

- of a row-wise op, eight neighbours: number ``col & 7`` of the block with counter ``(col >> 3, row, 0, site)``;
- of attention, rows r and r + 8 by columns c, c + 1, c + 8 and c + 9: number ``4 row[3] + 2 col[3] + col[0]``, where
  x[i] is bit i of x, of the block with counter ``(col without bits 3 and 0, row without bit 3, z, site)``. One thread
  holds them in the result of a tensor-core product, and in that of the transposed product those of equal col[0], so no
  thread needs what another has computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
ROUNDS = 7
_KEYS_SITE = 0x6B657973  # the last counter where a key is made
STEPS = 65536  # probabilities are whole numbers of these


def dropped(p: float) -> int:
    """How many of STEPS numbers drop their element: the nearest to `p`, and never all."""
    return min(max(int(p * STEPS + 0.5), 0), STEPS - 1)


def threshold(p: float) -> int:
    """The uint32 below which a number, in the high half of a word, drops its element."""
    return dropped(p) << 16


def scale(p: float) -> float:
    """What a kept element is multiplied by: the inverse of the probability that it is."""
    return STEPS / (STEPS - dropped(p))


def new_key(device: torch.device | str) -> torch.Tensor:
    """A fresh 64-bit key, int64 [1], drawn from torch's default generator of `device`.

    One is drawn per forward pass, on the device and without a host sync, so ``torch.manual_seed``, saved
    generator states, activation checkpointing and CUDA graphs all govern dropout as they do in PyTorch.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def micro_batch_keys(seed: int, step: int, micro_batches: range) -> torch.Tensor:
    """The dropout key of each of a step's micro-batches, int64 [n] on the CPU.

    A key depends on (seed, step, micro-batch) alone. So there is no state of a generator to save or to restore, and
    whichever process computes a micro-batch drops the same elements. Ten rounds, as keys are few and each is a seed.
    """
    micro = torch.arange(micro_batches.start, micro_batches.stop, dtype=torch.int64, device="cpu")
    low, high = (torch.full_like(micro, part & _MASK) for part in (step, step >> 32))
    seed = (seed + 2**63) % 2**64 - 2**63  # as a signed number
    words = block(torch.tensor(seed, device="cpu"), low, high, micro, _KEYS_SITE, rounds=10)
    return words[1] << 32 | words[0]


def _mul_hi_lo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b for 32-bit values held in int64, with no 64-bit overflow."""
    low = a * (b & 0xFFFF)  # < 2^48
    high = a * (b >> 16)  # < 2^48
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & _MASK


def block(
    key: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: int, rounds: int = ROUNDS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four uint32 output words, held in int64, of the counters (c0, c1, c2, c3), broadcastable int64 tensors."""
    c0, c1, c2 = torch.broadcast_tensors(c0 & _MASK, c1 & _MASK, c2 & _MASK)
    c3 = torch.full_like(c0, c3 & _MASK)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(_M0, c0)
        hi1, lo1 = _mul_hi_lo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _kept(words: tuple[torch.Tensor, ...], p: float) -> torch.Tensor:
    """Which of the eight elements of each block are kept, bool [..., 8]."""
    numbers = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(numbers, -1) >= dropped(p)


def keep_rows(key: torch.Tensor, site: int, n_rows: int, n_cols: int, p: float) -> torch.Tensor:
    """The bool mask [n_rows, n_cols] of a row-wise op (z = 0)."""
    row = torch.arange(n_rows, device=key.device).unsqueeze(1)
    eights = torch.arange((n_cols + 7) // 8, device=key.device)
    return _kept(block(key, eights, row, torch.zeros_like(row), site), p).flatten(1)[:, :n_cols]


def keep_tiles(key: torch.Tensor, site: int, n_heads: int, n_tokens: int, p: float) -> torch.Tensor:
    """The bool mask [n_heads, n_tokens, n_tokens] of attention: z = head, row = query, column = key."""
    patches = (n_tokens + 15) // 16  # 16 x 16 elements: 8 x 4 blocks
    z = torch.arange(n_heads, device=key.device).view(-1, 1, 1)
    row = torch.arange(8 * patches, device=key.device).unsqueeze(1)
    col = torch.arange(4 * patches, device=key.device)
    kept = _kept(block(key, col, row, z, site), p).view(n_heads, patches, 8, patches, 4, 2, 2, 2)
    kept = kept.permute(0, 1, 5, 2, 3, 6, 4, 7)  # row[3] before the rest of the row; col[3], the rest, col[0]
    return kept.reshape(n_heads, 16 * patches, 16 * patches)[:, :n_tokens, :n_tokens]


_KEYS = (torch.Tensor, type(None))


class Dropout(NamedTuple):
    """One dropout of one forward pass.

    Attributes:
        p: the probability of zeroing an element; 0 in eval mode.
        key: int64 [1], of this forward pass (`new_key`); needed where p is not 0.
        site: which dropout of the model this is; each draws its own mask from the key.
    """

    p: float = 0.0
    key: torch.Tensor | None = None
    site: int = 0

    @property
    def threshold(self) -> int:
        return threshold(self.p)

    @property
    def scale(self) -> float:
        return scale(self.p)

    def flat(self) -> tuple[float, torch.Tensor | None, int]:
        """Its three values for an operator; where nothing is dropped there is no key."""
        return self.p, self.key if self.p > 0.0 else None, self.site

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout of x [..., C], differentiable: the reference of every fused row-wise dropout."""
        if self.p == 0.0:
            return x
        keep = keep_rows(self.key, self.site, x.numel() // x.shape[-1], x.shape[-1], self.p).view(x.shape)
        return torch.where(keep, x * self.scale, torch.zeros((), dtype=x.dtype, device=x.device))

    def check(self, op: str, device: torch.device) -> None:
        """Raises TypeError or ValueError unless p is below 1 and there is, above 0, a key on `device`."""
        p, key, site = self
        for name, value, kinds in (("p", p, (float, int)), ("key", key, _KEYS), ("site", site, int)):
            if not isinstance(value, kinds):
                raise TypeError(f"{op}: dropout's {name} is a {type(value).__name__}; see philox.Dropout")
        if not 0.0 <= p < 1.0:
            raise ValueError(f"{op}: dropout's p is {p}; it must be at least 0 and below 1")
        if p > 0.0 and key is None:
            raise ValueError(f"{op}: dropout's p is {p} and its key is None; pass key=philox.new_key(device)")
        if key is not None and (key.dtype != torch.int64 or key.numel() != 1 or key.device != device):
            raise ValueError(
                f"{op}: dropout's key is {key.dtype} {tuple(key.shape)} on {key.device}; "
                f"it must be one int64 on {device}: philox.new_key(device)"
            )


NO_DROPOUT = Dropout()


def check_addition(op: str, residual: torch.Tensor | None, dropout: Dropout) -> None:
    """Raises ValueError where elements of what is added would be dropped, and nothing is added."""
    if residual is None and dropout.p > 0.0:
        raise ValueError(f"{op}: dropout's p is {dropout.p} and residual is None; it acts on what is added")
