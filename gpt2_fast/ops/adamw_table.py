"""The table through which `adamw`'s kernels reach the tensors: see csrc/adamw.h and kernels/adamw.py."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2_fast.ops.adamw_contract import OP, with_masters
from gpt2_fast.ops.runtime.dispatch import DTYPE_CODES, address

CHUNK = 8192  # elements of one tensor, what is summed alone and what one GPU program updates
ALIGNMENT = 16  # bytes that a GPU loads at once


class Row(NamedTuple):
    """What the kernels read of one parameter: a row of the table of csrc/adamw.h and kernels/adamw.py."""

    param: int  # addresses
    grad: int
    exp_avg: int
    exp_avg_sq: int
    master: int  # 0: none
    step: int
    numel: int
    group: int
    dtype: int  # of param and grad
    first_chunk: int  # chunks of the rows before

    @property
    def chunks(self) -> int:
        return -(-self.numel // CHUNK)


def table_rows(params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups) -> tuple[Row, ...]:
    """The table; empty tensors have no row."""
    rows, first_chunk = [], 0
    for p, master, g, m, v, step, group in with_masters(params, masters, grads, exp_avgs, exp_avg_sqs, steps, groups):
        if p.numel():
            tensors = (p, g, m, v, master, step)
            rows.append(Row(*map(address, tensors), p.numel(), group, DTYPE_CODES[p.dtype], first_chunk))
            first_chunk += rows[-1].chunks
    return tuple(rows)


class _Pinned:
    """Pinned memory from which CUDA graphs copy their tables at every replay: all that this file keeps in a process.

    While a graph is captured none can be allocated, so steps that are not captured put some aside.
    """

    SPARES = 8  # captures in a row, of one number of rows

    def __init__(self):
        self.spare: dict[tuple[torch.device, int], list[Tensor]] = {}
        self.captured: list[Tensor] = []  # kept for good: a graph may be replayed at any time

    def put_aside(self, table: Tensor, device: torch.device) -> None:
        spare = self.spare.setdefault((device, len(table)), [])
        while len(spare) < self.SPARES:
            spare.append(table.pin_memory())

    def capture(self, table: Tensor, device: torch.device) -> Tensor:
        """The table on the device, where a graph's replay copies it to."""
        spare = self.spare.get((device, len(table)))
        if not spare:
            raise RuntimeError(
                f"{OP}: a CUDA graph's step over {len(table)} parameters needs pinned memory, and none is put aside; "
                "take one step with these parameters outside of the capture first"
            )
        self.captured.append(spare.pop().copy_(table))
        return self.captured[-1].to(device, non_blocking=True)


_pinned = _Pinned()


def device_table(rows: tuple[Row, ...], device: torch.device) -> Tensor:
    """The table on a GPU, without a host sync."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _pinned.capture(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)  # of this graph alone
    return _eager_table(rows, device)


@functools.lru_cache(maxsize=8)
def _eager_table(rows: tuple[Row, ...], device: torch.device) -> Tensor:
    """The same addresses give the same tensor."""
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if device.type != "cuda":
        return table
    _pinned.put_aside(table, device)
    return table.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=8)
def chunk_rows(numels: tuple[int, ...], device: torch.device) -> Tensor:
    from gpt2_fast.kernels import adamw as kernel

    return kernel.chunk_rows(list(numels), device, CHUNK)
