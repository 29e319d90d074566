"""What a device adds to the norm of a vector that several of them hold: sums of squares, by the kernels of `adamw`."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_fast.ops.adamw import OP
from gpt2_fast.ops.adamw_table import ALIGNMENT, CHUNK, Row, chunk_rows, device_table
from gpt2_fast.ops.runtime import cpp, dispatch
from gpt2_fast.ops.runtime.dispatch import DTYPE_CODES, address


def chunk_squares_reference(flat: Tensor) -> Tensor:
    """What is correct: see `chunk_squares`."""
    sums = []
    for part in flat.view(-1, CHUNK).split(256):  # a little at a time: each number becomes eight bytes
        part = part.double().square_()
        while part.shape[1] > 1:  # halves, not torch.sum, whose order depends on threads and shapes
            part = part[:, : part.shape[1] // 2] + part[:, part.shape[1] // 2 :]
        sums.append(part[:, 0])
    return torch.cat(sums)


def _chunk_squares_cpp(rows, device):
    partial = torch.empty(rows[0].chunks, dtype=torch.float64, device="cpu")
    table = {"table": torch.tensor(rows, dtype=torch.int64, device="cpu"), "tensors": 1, "chunks": rows[0].chunks}
    cpp.adamw_grad_norm(**table, chunk=CHUNK, partial=partial, norm=torch.empty((), dtype=torch.float32, device="cpu"))
    return partial


def _chunk_squares_triton(rows, device):
    from gpt2_fast.kernels import adamw as kernel

    aligned = rows[0].grad % ALIGNMENT == 0
    table, chunks = device_table(rows, device), chunk_rows((rows[0].numel,), device)
    return kernel.partial_norms(table, chunks, aligned, CHUNK).double()


_CHUNK_SQUARES = {"cpp": _chunk_squares_cpp, "triton": _chunk_squares_triton}


@torch.no_grad()
def chunk_squares(flat: Tensor, impl: str = "auto") -> Tensor:
    """The sum of squares of each CHUNK elements of flat, float32 [n CHUNK] contiguous: float64 [n].

    A chunk's sum has the same bits wherever the chunk lies and however many there are, so what several devices have
    of one long vector can be added to its norm with the bits that it has on one.

    Raises:
        ValueError: another dtype or length, or not contiguous.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    if flat.ndim != 1 or flat.dtype != torch.float32 or not flat.is_contiguous() or len(flat) % CHUNK or not len(flat):
        raise ValueError(
            f"{OP}: flat is {flat.dtype} {tuple(flat.shape)}; it must be float32 [n x {CHUNK}], contiguous"
        )
    name = dispatch.choose(OP, impl, flat.device, flat.dtype)
    if name == "reference":
        return chunk_squares_reference(flat)
    at = address(flat)
    rows = (Row(at, at, at, at, 0, at, len(flat), 0, DTYPE_CODES[torch.float32], 0),)
    return _CHUNK_SQUARES[name](rows, flat.device)
