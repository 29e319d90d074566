"""Weights, keys and values as skinny products read them: from one end of memory to the other, once.

A matrix [N, K] of N outputs is stored in panels of 16 outputs, [ceil(N / 16), ceil(K / G), 16, G]: G neighbouring
inputs of an output lie together, as the instructions that sum pairs or quads take them. What pads a panel is zero.

=========  ==  =====================================================================================
float32    1   as they are
bfloat16   2   rounded to nearest even
int8       4   q + 128 in uint8 with q = round(w / scale) in [-127, 127], one float32 scale an output
=========  ==  =====================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_fast.ops.dispatch import address

PANEL = 16
GROUPS = {"float32": 1, "bfloat16": 2, "int8": 4}
CODES = {"float32": 0, "bfloat16": 1, "int8": 2}  # csrc/decode_step.h


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def padded(vector: Tensor | None) -> Tensor | None:
    """A float32 copy of a vector, zero up to a multiple of PANEL; None for None."""
    if vector is None:
        return None
    return F.pad(vector.detach().float(), (0, round_up(len(vector), PANEL) - len(vector))).clone()


class PackedMatrix:
    """A matrix [N, K], and the bias [N] of its product, for y = x @ matrix^T + bias.

    Args:
        matrix: [N, K], any floating dtype and strides.
        weights: "float32", "bfloat16" or "int8".
        bias: [N], kept in float32.

    Attributes:
        panels: as above. scale, bias: float32, zero up to a multiple of 16, or None.
    """

    def __init__(self, matrix: Tensor, weights: str, bias: Tensor | None = None):
        self.shape, self.weights = matrix.shape, weights
        self.bias = padded(bias)
        self.scale = None
        matrix = matrix.detach().float()
        if weights == "int8":
            largest = matrix.abs().amax(1)
            scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
            matrix = (matrix / scale.unsqueeze(1)).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
            self.scale = padded(scale)
        elif weights == "bfloat16":
            matrix = matrix.bfloat16()
        self.panels = _to_panels(matrix, GROUPS[weights], 128 if weights == "int8" else 0)

    def table(self) -> list[int]:
        """DecodeMatrix of csrc/decode_step.h."""
        return [address(self.panels), address(self.scale), address(self.bias)]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.panels, self.scale, self.bias) if t is not None)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] that the stored numbers mean."""
        N, K = self.shape
        matrix = self.panels.transpose(1, 2).reshape(-1, self.panels.shape[1] * self.panels.shape[3])[:N, :K].to(dtype)
        return matrix if self.scale is None else (matrix - 128) * self.scale[:N].to(dtype).unsqueeze(1)


def _to_panels(matrix: Tensor, group: int, zero: int) -> Tensor:
    N, K = matrix.shape
    matrix = F.pad(matrix, (0, round_up(K, group) - K, 0, round_up(N, PANEL) - N), value=zero)
    return matrix.view(-1, PANEL, matrix.shape[1] // group, group).transpose(1, 2).contiguous()
