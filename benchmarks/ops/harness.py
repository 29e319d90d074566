"""What a bench_<op>.py is made of: a Case, the programs compared, the check that comes first, this machine's ceilings.

A floor is the time that an op's bytes or FLOPs, as its room's `cost()` has them, would take at the rate of a copy
that moves as many bytes, or of a large product in the same dtype, measured before each turn on the same threads.
Percent of the ceiling is floor / time, the median over turns. A copy that fits a cache is faster than one that does
not, so the copy is made as large as what it is compared with.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt2_fast.ops.runtime.products import product

PROGRAMS = ("gpt2_fast", "library", "compile", "eager")
L2_FLUSH_BYTES = 256 << 20  # more than any GPU's L2
HEAD_START_CYCLES = 5_000_000  # of the device, about 3 ms: more than the host takes to launch a backward


@dataclass(frozen=True)
class Size:
    """The model and batch that give every op its shape, and the edge of the product that is the ceiling."""

    B: int
    T: int
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    n_layer: int = 12
    product: int = 2048

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


SIZES = {
    "cpu": Size(4, 256, n_layer=2),  # of AdamW's parameters: two layers and the embeddings, which fit no cache either
    "cuda": Size(16, 1024, product=8192),
    "smoke": Size(2, 16, 2, 32, 97, 1, product=64),
}


@dataclass
class Case:
    """One op at one shape and dtype.

    shape: as the table prints it.
    inputs: what every program takes; floating tensors get gradients.
    programs: PROGRAMS -> function of `inputs`. Without "compile" the reference, "eager", is compiled. "library" is
        what the file's LIBRARY names; without it the reference already is the library's op.
    cost: direction -> {"bytes", "flops"}, from the room.
    check_inputs: inputs that are held against float64, a cut of `inputs` where those would take long.
    check: holds a program to float64 and raises AssertionError; by default `numerics.check_op` on check_inputs.
    differentiable: False for an op without a backward.
    op: what its rows are called; the stem of the file where it is not given.
    """

    shape: str
    inputs: tuple
    programs: dict[str, Callable]
    cost: dict[str, dict[str, int]]
    check_inputs: tuple | None = None
    check: Callable[[Callable], None] | None = None
    differentiable: bool = True
    op: str = ""
    _verdicts: dict[str, str] = field(default_factory=dict)
    _upstream: Sequence[Tensor] = ()

    def __post_init__(self):
        if self.differentiable:
            self.inputs = tuple(_leaf(x) for x in self.inputs)

    def program(self, name: str) -> Callable:
        """The function of that name, compiled once."""
        if name == "compile" and name not in self.programs:
            torch._dynamo.reset()
            self.programs[name] = torch.compile(self.programs["eager"])
        return self.programs[name]

    def verdict(self, name: str, dtype: torch.dtype) -> str:
        """Why program `name` is wrong, or "" when its values and gradients pass; computed once."""
        if name not in self._verdicts:
            try:
                self._check(self.program(name), dtype)
                self._verdicts[name] = ""
            except AssertionError as error:
                self._verdicts[name] = str(error).splitlines()[0]
        return self._verdicts[name]

    def _check(self, run: Callable, dtype: torch.dtype) -> None:
        if self.check is not None:
            return self.check(run)
        from numerics import check_op  # tests/, which benchmarks/conftest.py puts on the path

        check_op(run, self.programs["eager"], self.check_inputs or self.inputs, dtype)

    def timed(self, name: str, direction: str) -> tuple[Callable, Callable | None]:
        """(target, setup) of one direction; setup, untimed, returns what target takes, as pytest-benchmark has it."""
        run = self.program(name)
        leaves = [x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad]

        def forward():
            return _tuple(run(*self.inputs))

        def backward(outputs):
            return torch.autograd.grad(outputs, leaves, self._upstream, allow_unused=True)

        if direction == "inference":
            return torch.no_grad()(forward), None
        if direction in ("forward", "step"):
            return (forward if self.differentiable else torch.no_grad()(forward)), None
        if not self._upstream:
            self._upstream = [torch.randn_like(o) for o in forward()]
        if direction == "backward":
            return backward, lambda: ((forward(),), {})
        if direction == "forward+backward":
            return lambda: backward(forward()), None
        raise ValueError(f"direction {direction!r}; a case has {', '.join(self.cost)}")


def _leaf(x):
    return x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def _tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class EventTimer:
    """pytest-benchmark's timer on a GPU: called before and after a target, it returns seconds of device time so far.

    The first call of a pair only records an event, behind a device that first empties its L2 and then waits while the
    host launches, so what is measured is the kernels and not Python. Emptying alone, 0.1 ms, was too short: what an
    H200 showed of most backwards was the host.
    """

    def __init__(self):
        self.seconds, self.start, self.flush = 0.0, None, None

    def __call__(self) -> float:
        if self.start is None:
            if self.flush is None:
                self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
            self.flush.zero_()
            torch.cuda._sleep(HEAD_START_CYCLES)
            self.start = torch.cuda.Event(enable_timing=True)
            self.start.record()
            return self.seconds
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        self.seconds += self.start.elapsed_time(end) * 1e-3
        self.start = None
        return self.seconds


TIMER = EventTimer() if torch.cuda.is_available() else time.perf_counter


def count_cpu_seconds() -> None:
    """From here on: one thread, and the processor's seconds instead of the clock's, which others' work lengthens."""
    global TIMER
    torch.set_num_threads(1)
    TIMER = time.thread_time


def fastest(run: Callable, rounds: int = 5) -> float:
    """The fewest seconds of several calls, after one that is not counted."""
    run()
    seconds = []
    for _ in range(rounds):
        start = TIMER()
        run()
        seconds.append(TIMER() - start)
    return min(seconds)


@functools.lru_cache(maxsize=2)
def _copied(half: int, device: str) -> tuple[Tensor, Tensor]:
    return tuple(torch.ones(half, dtype=torch.uint8, device=device) for _ in range(2))


@functools.lru_cache(maxsize=2)
def _multiplied(edge: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))


def copy_rate_now(size: int, device: str, rounds: int = 3) -> float:
    """Bytes a second, read and written, of a copy that moves `size` bytes (1 MiB to 1 GiB)."""
    half = min(max(size, 1 << 20), 1 << 30) // 2
    source, target = _copied(half, device)
    return 2 * half / fastest(lambda: target.copy_(source), rounds)


def product_rate_now(edge: int, dtype: torch.dtype, device: str, rounds: int = 2) -> float:
    """FLOPs a second of an [edge, edge] product: torch's own or the one this package picks, whichever is faster."""
    a, b = _multiplied(edge, dtype, device)
    return 2 * edge**3 / min(fastest(run, rounds) for run in (lambda: torch.mm(a, b), lambda: product(a, b)))


@functools.cache
def copy_rate(size: int, device: str) -> float:
    """`copy_rate_now`, once for the whole run."""
    return copy_rate_now(size, device, rounds=10)


@functools.cache
def product_rate(edge: int, dtype: torch.dtype, device: str) -> float:
    """`product_rate_now`, once for the whole run."""
    return product_rate_now(edge, dtype, device, rounds=5)


def floor_seconds(cost: dict[str, int], edge: int, dtype: torch.dtype, device: str) -> tuple[float, str]:
    """The least time that `cost` allows on this machine, and what it is bound by: "bytes" or "flops"."""
    by_bytes = cost["bytes"] / copy_rate(cost["bytes"], device)
    by_flops = cost["flops"] / product_rate(edge, dtype, device)
    return (by_bytes, "bytes") if by_bytes >= by_flops else (by_flops, "flops")


def floor_seconds_now(cost: dict[str, int], edge: int, dtype: torch.dtype, device: str) -> tuple[float, str]:
    """`floor_seconds` at the rate of this moment: a machine that others use has another one a minute later."""
    _, bound = floor_seconds(cost, edge, dtype, device)
    if bound == "bytes":
        return cost["bytes"] / copy_rate_now(cost["bytes"], device), bound
    return cost["flops"] / product_rate_now(edge, dtype, device), bound
