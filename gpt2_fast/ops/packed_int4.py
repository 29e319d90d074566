"""Weights of 4 bits: a code chooses one of 16 levels, and 32 neighbouring inputs of an output share a scale.

    w = LEVELS[code] * scale        4.5 bits a weight; level times scale is exact in float32

The levels are not evenly spaced: they have the least squared error for normal numbers in groups of 32, each group with
the scale that is best for it (Lloyd's algorithm, Least squares quantization in PCM, 1982; tests/ops/test_packed_int4.py
runs it). No calibration text is read. Scales are bfloat16, as float16 has no room for weights below 6e-8 or scales
above 65504; they may be negative, since the levels reach further on one side.

Panels of 16 outputs lie as csrc/decode_int4.h reads them, in lines of 64 bytes: for two groups one of scales
[2, 16] bfloat16, and four of codes for each, [16, 4] bytes of two codes: inputs 0 to 3 low, 4 to 7 high.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 32
LINE, LINES = 64, 4  # bytes of a line, lines of a group's codes
LEVELS = torch.tensor(
    [-114, -92, -73, -56, -41, -28, -16, -4, 7, 19, 31, 45, 60, 78, 100, 127], dtype=torch.int8, device="cpu"
)
STARTS = (float(LEVELS[-1]), float(LEVELS[0]))  # what a group's largest weight is at first taken for
CHUNK = 1 << 11  # groups at a time: their temporaries stay in the cache

# The code of every half from -128 to 127.5 and of what lies up to the next: where two levels meet is a whole or a half.
_MEETINGS = (LEVELS[1:].float() + LEVELS[:-1].float()) / 2
CODE_OF_HALF = torch.bucketize(
    torch.arange(-256, 256, dtype=torch.float32, device="cpu") / 2, _MEETINGS, right=True
).to(torch.uint8)
LEVEL_OF_HALF = LEVELS[CODE_OF_HALF.long()].float()


def check_inputs(what: str, inputs: int) -> None:
    """Raises ValueError where `inputs`, which the caller calls `what`, are no whole number of groups."""
    if inputs % GROUP:
        raise ValueError(
            f"{what} is {inputs}, and int4 packs {GROUP} inputs a group; choose weights='int8', which takes any number"
        )


def _nearest(groups: Tensor, scale: Tensor, of_half: Tensor) -> Tensor:
    """[n, 32]: what of_half, one of the two tables above, has for groups [n, 32] over scale [n, 1]."""
    # 0 / 0 takes the first level: times a scale of 0 every one is 0.
    halves = (groups / scale).mul_(2).floor_().nan_to_num_(-256).clamp_(-256, 255).add_(256)
    return of_half.index_select(0, halves.to(torch.int32).view(-1)).view_as(groups)


def _best(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n, 32] and scale bfloat16 [n, 1] of groups float32 [n, 32], the best of those tried.

    Sums are float64, so that C++ (csrc/decode_pack.cpp) finds the same in whatever order it adds.
    """
    high, low = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
    largest, exact = torch.where(-low > high, low, high), groups.double()
    least, scale = torch.full_like(exact[:, :1], torch.inf), largest
    for start in STARTS:
        levels = _nearest(groups, largest / start, LEVEL_OF_HALF).double()
        tried = (exact * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)
        tried = tried.float().bfloat16().float()
        meant = _nearest(groups, tried, LEVEL_OF_HALF).double() * tried.double()
        error = meant.sub_(exact).square_().sum(1, keepdim=True)
        better = error < least
        least, scale = torch.where(better, error, least), torch.where(better, tried, scale)
    finite = groups.isfinite().all(1, keepdim=True)
    return _nearest(groups, scale, CODE_OF_HALF), torch.where(finite, scale, torch.nan).bfloat16()


def quantised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K] and scales bfloat16 [N, K / 32] of a matrix [N, K], K a multiple of 32."""
    N, K = matrix.shape
    codes = torch.empty(N, K, dtype=torch.uint8, device="cpu")
    scales = torch.empty(N, K // GROUP, dtype=torch.bfloat16, device="cpu")
    rows = max(1, CHUNK * GROUP // K)
    for begin in range(0, N, rows):
        part = matrix[begin : begin + rows].float().contiguous().view(-1, GROUP)
        code, scale = _best(part)
        codes[begin : begin + rows] = code.view(-1, K)
        scales[begin : begin + rows] = scale.view(-1, K // GROUP)
    return codes, scales


def lines_of(groups: int) -> int:
    """Lines of a panel."""
    return (groups + 1) // 2 + LINES * groups


def to_panels(codes: Tensor, scales: Tensor, panel: int) -> Tensor:
    """uint8 [ceil(N / panel), lines, 64] of what `quantised` gave; outputs that pad the last panel are zero."""
    N, groups = scales.shape
    spare, odd = -N % panel, groups % 2
    codes = F.pad(codes, (0, odd * GROUP, 0, spare)).view(-1, panel, groups + odd, LINES, 2, 4)
    pairs = codes[..., 0, :] | codes[..., 1, :] << 4  # [panels, 16, groups, lines, 4]
    pairs = pairs.permute(0, 2, 3, 1, 4).reshape(-1, (groups + odd) // 2, 2 * LINES, LINE)
    scales = F.pad(scales, (0, odd, 0, spare)).view(-1, panel, (groups + odd) // 2, 2).permute(0, 2, 3, 1)
    scales = scales.contiguous().view(torch.uint8).view(-1, (groups + odd) // 2, 1, LINE)
    return torch.cat([scales, pairs], 2).flatten(1, 2)[:, : lines_of(groups)]


def dequantised(panels: Tensor, N: int, K: int, panel: int, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] that panels mean."""
    groups = K // GROUP
    panels = F.pad(panels, (0, 0, 0, groups % 2 * LINES)).unflatten(1, (-1, 1 + 2 * LINES))  # [panels, pairs, 9, 64]
    scales = panels[:, :, 0].contiguous().view(torch.bfloat16).view(len(panels), -1, 2, panel)
    scales = scales.permute(0, 3, 1, 2).reshape(-1, scales.shape[1] * 2, 1)[:N, :groups]
    pairs = panels[:, :, 1:].reshape(len(panels), -1, LINES, panel, 4).permute(0, 3, 1, 2, 4)
    codes = torch.stack([pairs & 15, pairs >> 4], 4).flatten(0, 1).flatten(2)[:N, :groups]  # [N, groups, 32]
    return (LEVELS.to(dtype)[codes.long()] * scales.to(dtype)).reshape(N, K)
