"""Weights, keys and values as skinny products read them: from one end of memory to the other, once.

A matrix [N, K] of N outputs is stored in panels of 16 outputs, [ceil(N / 16), ceil(K / G), 16, G]: G neighbouring
inputs of an output lie together, as the instructions that sum pairs or quads take them. What pads a panel is zero.

=========  ==  =====================================================================================
float32    1   as they are
bfloat16   2   rounded to nearest even
int8       4   q + 128 in uint8 with q = round(w / scale) in [-127, 127], one float32 scale an output
int4       32  codes of 4 bits and a bfloat16 scale for 32 inputs of an output, see `packed_int4`
=========  ==  =====================================================================================
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_fast.ops import packed_int4
from gpt2_fast.ops.runtime import cpp, dispatch
from gpt2_fast.ops.runtime.memory import large_pages, round_up

PANEL = 16
GROUPS = {"float32": 1, "bfloat16": 2, "int8": 4}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}  # of panels
CODES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}  # csrc/decode_step.h


def padded(vector: Tensor | None) -> Tensor | None:
    """A float32 copy of a vector, zero up to a multiple of PANEL; None for None."""
    if vector is None:
        return None
    return F.pad(vector.detach().float(), (0, round_up(len(vector), PANEL) - len(vector))).clone()


class HugePages:
    """Memory for tensors that are read from end to end, zero at first, on pages of 2 MiB where the system gives them.

    With pages of 4 KiB a thread that streams weights misses its translation cache every 64 lines. A part is taken from
    the system when the one before is full; what nobody has written of it is no memory yet.
    """

    PART = 64 << 20
    ALIGNMENT = 64

    def __init__(self):
        self._part, self._used = torch.empty(0, dtype=torch.uint8, device="cpu"), 0

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros, which keeps its part alive."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._used + nbytes > self._part.numel():
            memory = large_pages(round_up(max(nbytes, self.PART), 2 << 20))
            self._part, self._used = torch.frombuffer(memory, dtype=torch.uint8), 0
        taken = self._part[self._used : self._used + nbytes].view(dtype).view(shape)
        self._used += round_up(nbytes, self.ALIGNMENT)
        return taken


class PackedMatrix:
    """A matrix [N, K], and the bias [N] of its product, for y = x @ matrix^T + bias.

    Args:
        matrix: [N, K], any floating dtype and strides.
        weights: "float32", "bfloat16", "int8" or "int4".
        bias: [N], kept in float32.
        memory: where the panels go.
        impl: who packs, "cpp" or "reference": both make the same numbers.

    Attributes:
        panels: as above. scale, bias: float32, zero up to a multiple of 16, or None.

    Raises ValueError in int4 where K is no multiple of 32.
    """

    def __init__(
        self, matrix: Tensor, weights: str, bias: Tensor | None = None, *, memory: HugePages, impl: str = "reference"
    ):
        self.shape, self.weights = matrix.shape, weights
        self.bias = padded(bias)
        (N, K), matrix = matrix.shape, matrix.detach()
        panels = -(-N // PANEL)
        if weights == "int4":
            packed_int4.check_inputs("K", K)
            shape, dtype = (panels, packed_int4.lines_of(K // packed_int4.GROUP), packed_int4.LINE), torch.uint8
        else:
            shape, dtype = (panels, -(-K // GROUPS[weights]), PANEL, GROUPS[weights]), DTYPES[weights]
        self.panels = memory.zeros(shape, dtype)
        self.scale = torch.zeros(panels * PANEL, dtype=torch.float32, device="cpu") if weights == "int8" else None
        (_pack_cpp if impl == "cpp" else _pack_reference)(matrix, weights, self.panels, self.scale)

    def table(self) -> list[int]:
        return cpp.struct("DecodeMatrix", panels=self.panels, scale=self.scale, bias=self.bias)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.panels, self.scale, self.bias) if t is not None)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] that the stored numbers mean."""
        N, K = self.shape
        if self.weights == "int4":
            return packed_int4.dequantised(self.panels, N, K, PANEL, dtype)
        matrix = self.panels.transpose(1, 2).reshape(-1, self.panels.shape[1] * self.panels.shape[3])[:N, :K].to(dtype)
        return matrix if self.scale is None else (matrix - 128) * self.scale[:N].to(dtype).unsqueeze(1)


def _pack_cpp(matrix: Tensor, weights: str, panels: Tensor, scale: Tensor | None) -> None:
    matrix = matrix.resolve_neg() if matrix.dtype in dispatch.KERNEL_DTYPES else matrix.float()
    if 1 not in matrix.stride():
        matrix = matrix.contiguous()
    (N, K), (by_output, by_input) = matrix.shape, matrix.stride()
    cpp.decode_pack(
        matrix=matrix, N=N, K=K, by_output=by_output, by_input=by_input, weights=CODES[weights],
        levels=packed_int4.LEVELS, panels=panels, scale=scale,
    )  # fmt: skip


def _pack_reference(matrix: Tensor, weights: str, panels: Tensor, scale: Tensor | None) -> None:
    if weights == "int4":
        panels.copy_(packed_int4.to_panels(*packed_int4.quantised(matrix), PANEL))
        return
    (N, K), matrix, zero = matrix.shape, matrix.float(), 0
    if scale is not None:
        largest = matrix.abs().amax(1)
        # NaN and inf stay in the scale: what whole numbers make of them is lost.
        scale[:N] = torch.where(largest == 0, torch.ones_like(largest), largest / 127)
        matrix = (matrix / scale[:N].unsqueeze(1)).nan_to_num_(0).round_().clamp_(-127, 127).add_(128)
        zero = 128
    group = panels.shape[-1]
    matrix = F.pad(matrix, (0, -K % group, 0, -N % PANEL), value=zero)
    panels.copy_(matrix.view(-1, PANEL, matrix.shape[1] // group, group).transpose(1, 2))
