"""Dropout masks from Philox4x32-10: the same function of (key, site, coordinates) in every backend.

Philox (Salmon et al., SC 2011) is a counter-based generator: a mask is computed from where an element is, not
from what was drawn before it. So the reference, the C++ kernels (``csrc/philox.h``) and the Triton kernels
(``kernels/philox.py``) drop the same elements to the bit, the backward pass recomputes the mask instead of
storing it, and a resumed run repeats.

An element has coordinates (z, row, col) within the dropout `site` (which dropout of the model this is). Its
word is output ``col & 3`` of the block with counter ``(col >> 2, row, z, site)``. It is kept where
``word >= threshold(p)``, and then scaled by ``1 / (1 - p)``.
"""

from __future__ import annotations

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The uint32 below which a word drops its element, for dropout probability `p`."""
    return min(max(int(p * 2.0**32), 0), _MASK)


def new_key(device: torch.device | str) -> torch.Tensor:
    """A fresh 64-bit key, int64 [1], drawn from torch's default generator of `device`.

    One is drawn per forward pass, on the device and without a host sync, so ``torch.manual_seed``, saved
    generator states, activation checkpointing and CUDA graphs all govern dropout as they do in PyTorch.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _mul_hi_lo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b for 32-bit values held in int64, with no 64-bit overflow."""
    low = a * (b & 0xFFFF)  # < 2^48
    high = a * (b >> 16)  # < 2^48
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & _MASK


def words(key: torch.Tensor, site: int, z: torch.Tensor, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    """The uint32 words, held in int64, at broadcastable int64 coordinates."""
    block = (col >> 2).to(torch.int64)
    c0, c1, c2 = torch.broadcast_tensors(block, row.to(torch.int64) & _MASK, z.to(torch.int64) & _MASK)
    c3 = torch.full_like(c0, site & _MASK)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(_M0, c0)
        hi1, lo1 = _mul_hi_lo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    lane = (col & 3).expand(c0.shape)
    return torch.where(lane == 0, c0, torch.where(lane == 1, c1, torch.where(lane == 2, c2, c3)))


def keep_rows(key: torch.Tensor, site: int, n_rows: int, n_cols: int, p: float) -> torch.Tensor:
    """The bool mask [n_rows, n_cols] of a row-wise op (z = 0)."""
    row = torch.arange(n_rows, device=key.device).unsqueeze(1)
    col = torch.arange(n_cols, device=key.device).unsqueeze(0)
    return words(key, site, torch.zeros_like(row), row, col) >= threshold(p)


def dropout_rows(x: torch.Tensor, p: float, key: torch.Tensor | None, site: int) -> torch.Tensor:
    """Dropout of a [N, C] tensor, differentiable: the reference of every fused row-wise dropout."""
    if p == 0.0:
        return x
    keep = keep_rows(key, site, x.shape[0], x.shape[1], p)
    return torch.where(keep, x * (1.0 / (1.0 - p)), torch.zeros((), dtype=x.dtype, device=x.device))


def arguments(p: float, key: torch.Tensor | None, site: int) -> tuple[int, int, float, int]:
    """What every C++ kernel with dropout takes last: key address (0: no dropout), threshold, scale, site."""
    return (key.data_ptr(), threshold(p), 1.0 / (1.0 - p), site) if p > 0.0 else (0, 0, 1.0, site)


def check(op: str, p: float, key: torch.Tensor | None, device: torch.device) -> None:
    """Raises ValueError unless `p` is a probability below 1 with a key to draw from."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p is {p}; it must be at least 0 and below 1")
    if p > 0.0 and key is None:
        raise ValueError(f"{op}: dropout_p is {p} and rng is None; pass rng=philox.new_key(device)")
    if key is not None and (key.dtype != torch.int64 or key.numel() != 1 or key.device != device):
        raise ValueError(
            f"{op}: rng is {key.dtype} {tuple(key.shape)} on {key.device}; "
            f"it must be one int64 on {device}: philox.new_key(device)"
        )
