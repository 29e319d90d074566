"""The processes of a run, as torchrun starts them: NCCL between GPUs, gloo between CPUs.

A process that is alone is a group of one, and sends nothing. What is sent is copied and never added on its way, except
for maxima: sums are made by those who receive, in an order that does not depend on how many there are.

A process that ends takes the others with it. They notice a closed connection at once, and one that says nothing after
the time limit; both are `Lost`. Of all processes the first to fail says why, in one line.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 1 << 24  # elements that are sent at a time from host memory to host memory
# Its name from torch 2.13 on, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_FAILED = "failed"

_current: Group | None = None


class Lost(RuntimeError):
    """Another process ended, or said nothing for the time limit."""


class Group:
    """The processes of a run, as `join` makes it; `Group()` is one that is alone.

    Attributes:
        rank, world: which process this is, of how many.
        local_rank, local_world: the same on this machine.
        first: whether this is rank 0, which writes, prints and decides.
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, local_world: int = 1):
        self.rank, self.world, self.local_rank, self.local_world = rank, world, local_rank, local_world
        self.first = rank == 0
        self._store: dist.Store | None = None
        self._minutes = 0.0
        self._turn = 0
        self._launcher: int | None = None

    def _connect(self, minutes: float) -> None:
        self._minutes = minutes
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        with self._talking():
            self._store = _open_store(self.rank, self.world, timedelta(minutes=minutes))
            # What is agreed upon is on the CPU, whatever computes.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(minutes=minutes), store=self._store,
                rank=self.rank, world_size=self.world,
            )  # fmt: skip

    def set_limit(self, minutes: float) -> None:
        """The time limit of everything that one process waits for of another, from here on."""
        if self.world > 1 and minutes != self._minutes:
            self._minutes = minutes
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes))

    @contextmanager
    def _talking(self, to_store: bool = False) -> Iterator[None]:
        """Makes an error of a connection `Lost`. to_store: it is the one to whoever keeps the store."""
        try:
            yield
        except Lost:
            raise
        except RuntimeError as error:  # dist.DistError is one
            if self._orphaned():
                raise self._without_torchrun() from error
            if re.search("[Tt]imed? ?out", str(error).splitlines()[0]):
                raise Lost(
                    f"rank {self.rank} waited {self._minutes:g} minutes for another process, which hangs or is slower "
                    "(--timeout-minutes); go on from the last checkpoint with --resume"
                ) from error
            if to_store and _torchrun_keeps_store():  # its connections close before its children get another parent
                raise self._without_torchrun() from error
            raise Lost(
                f"rank {self.rank} lost another process, which has ended; go on from the last checkpoint with --resume"
            ) from error

    def _orphaned(self) -> bool:
        """Whether torchrun has ended: nobody would end these processes then, or start them again."""
        return self._launcher not in (None, os.getppid())

    def _without_torchrun(self) -> Lost:
        return Lost(f"rank {self.rank}: torchrun has ended; go on from the last checkpoint with --resume")

    def exchange(self, received: Tensor, sent: Tensor) -> None:
        """sent [world, n] -> received [world, n], laid flat: row r of `sent` goes to rank r, from each its own row."""
        with self._talking():
            dist.all_to_all_single(received, sent)

    def gather(self, part: Tensor) -> Tensor:
        """[n] of every process, in the order of ranks: [world n]."""
        if self.world == 1:
            return part
        whole = part.new_empty(self.world * part.numel())
        with self._talking():
            _all_gather(whole, part.contiguous().view(-1))
        return whole

    def gather_in_place(self, whole: Tensor) -> None:
        """whole [world n]: each process has made its own n elements, and gets those of the others."""
        if self.world == 1:
            return
        n = whole.numel() // self.world
        part = whole[self.rank * n : (self.rank + 1) * n]
        with self._talking():
            _all_gather(whole, part if whole.is_cuda else part.clone())

    def agree(self, *values: int) -> list[int]:
        """The largest of each value over all processes. Every process must call it at the same point.

        Raises Lost where torchrun has ended.
        """
        if self.world == 1:
            return list(values)
        if self._orphaned():
            raise self._without_torchrun()
        numbers = torch.tensor(values or (0,), dtype=torch.int64, device="cpu")
        with self._talking():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def barrier(self) -> None:
        """Waits for every process, within the time limit."""
        self.agree()

    def decide(self, make: Callable[[], Any]) -> Any:
        """`make()` of the first process, everywhere. The others wait for it as long as it takes, with no time limit:
        what is made as a run starts may read a whole data set or checkpoint.

        What it makes is sent as JSON, which holds no code: numbers, words, lists, dicts.
        """
        if self.world == 1:
            return make()
        self._turn += 1
        key = f"decision {self._turn}"
        if self.first:
            value = make()
            with self._talking(to_store=True):
                self._store.set(key, json.dumps(value))
            return value
        self._wait(key)
        with self._talking(to_store=True):
            return json.loads(self._store.get(key))

    def in_turn(self, make: Callable[[], Any]) -> Any:
        """`make()` of every process: on each machine of one first, so that the others find what it put in the cache."""
        if self.world == 1:
            return make()
        self._turn += 1
        key = f"turn {self._turn} {self.rank - self.local_rank}"
        if self.local_rank == 0:
            value = make()
            with self._talking(to_store=True):
                self._store.set(key, b"done")
            return value
        self._wait(key)
        return make()

    def _wait(self, key: str) -> None:
        """For a key in the store. Ends when a process has failed meanwhile."""
        pause = 0.01
        with self._talking(to_store=True):
            while not self._store.check([key]):
                if self._store.check([_FAILED]):
                    raise Lost(f"rank {self.rank}: another process has failed")
                time.sleep(pause)
                pause = min(2 * pause, 0.5)

    def same(self, value: Any, message: str) -> None:
        """Raises ValueError with `message` unless `value` is the first process's."""
        words = json.dumps(value, sort_keys=True)
        if self.decide(lambda: words) != words:
            raise ValueError(message)

    def send_first(self, flat: Tensor, rank: int) -> Iterator[tuple[int, Tensor]]:
        """`flat` [n] of process `rank` in the first one: (where it begins, a piece in host memory), piece by piece.

        Both must run through it; the sender gets nothing.
        """
        if rank == 0:
            if self.first:
                yield 0, flat
            return
        for start in range(0, flat.numel(), PIECE):
            piece = flat[start : start + PIECE]
            if self.rank == rank:
                with self._talking():
                    dist.send(piece.cpu().contiguous(), 0)
            elif self.first:
                host = torch.empty(piece.shape, dtype=piece.dtype, device="cpu")
                with self._talking():
                    dist.recv(host, rank)
                yield start, host

    def broadcast_from_first(self, flat: Tensor) -> None:
        """Writes the first process's `flat` [n], on any device, into every other's."""
        if self.world == 1:
            return
        for start in range(0, flat.numel(), PIECE):
            piece = flat[start : start + PIECE]
            host = piece.cpu().contiguous()
            with self._talking():
                dist.broadcast(host, 0)
            if not self.first:
                piece.copy_(host)

    def speaks(self) -> bool:
        """Whether this process is the first that failed, and so the one that says why."""
        if self._store is None:
            return self.first
        try:
            return self._store.add(_FAILED, 1) == 1
        except RuntimeError:  # whoever kept the store is gone
            return True

    def close(self) -> None:
        """Ends the connections, when every process has come here."""
        if self._store is not None:
            self.barrier()
            dist.destroy_process_group()
            self._store = None


def _open_store(rank: int, world: int, limit: timedelta) -> dist.Store:
    """torchrun's store, or one that rank 0 keeps.

    torchrun keeps its own for all restarts, and with it the addresses of processes that are gone: torch's own
    initialisation then connects to them. So each start has names of its own.
    """
    environment = os.environ
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(f"WORLD_SIZE is {world} and {missing[0]} is not set; start the processes by torchrun")
    store = dist.TCPStore(
        environment["MASTER_ADDR"],
        _number("MASTER_PORT", environment["MASTER_PORT"], 1, 65535),
        world,
        rank == 0 and not _torchrun_keeps_store(),
        limit,
    )
    return dist.PrefixStore(f"gpt2_fast {environment.get('TORCHELASTIC_RESTART_COUNT', 0)} of {world}", store)


def _torchrun_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def environment_world() -> int:
    """How many processes torchrun, or who else sets its variables, has started."""
    return _number("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"), 1, 1 << 20)


def environment_rank() -> int:
    world = environment_world()
    if world > 1 and "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {world} and RANK is not set; start the processes by torchrun")
    return _number("RANK", os.environ.get("RANK", "0"), 0, world - 1)


def _number(name: str, text: str, low: int, high: int) -> int:
    """What one of the variables that torchrun sets says. Raises ValueError, one line."""
    if not (text.isdecimal() and low <= int(text) <= high):
        raise ValueError(f"{name} is {text!r}; it is a number from {low} to {high}, start the processes by torchrun")
    return int(text)


def join(minutes: float) -> Group:
    """The group of this process, of the variables that torchrun sets; without them a group of one.

    Args:
        minutes: the time limit of everything that one process waits for of another.
    """
    global _current
    if _current is None:
        world, rank = environment_world(), environment_rank()
        local_rank, local_world = (
            os.environ.get("LOCAL_RANK", str(rank)),
            os.environ.get("LOCAL_WORLD_SIZE", str(world)),
        )
        local = _number("LOCAL_RANK", local_rank, 0, world - 1), _number("LOCAL_WORLD_SIZE", local_world, 1, world)
        _current = Group(rank, world, *local)
        if world > 1:
            _current._connect(minutes)
    return _current


def leave() -> None:
    """Waits for the other processes and ends the connections."""
    global _current
    if _current is not None:
        group, _current = _current, None
        group.close()


def current() -> Group | None:
    """The group that this process has joined."""
    return _current


def check_world(world: int, micro_batches: int) -> None:
    """Raises ValueError, one line that names what works, unless `world` is a power of two that divides the number."""
    if world & (world - 1) == 0 and micro_batches % world == 0:
        return
    works = [2**k for k in range(micro_batches.bit_length()) if micro_batches % 2**k == 0]
    good = f"{', '.join(map(str, works[:-1]))} or {works[-1]}" if works[1:] else "1"
    raise ValueError(
        f"{world} processes cannot share --grad-accum {micro_batches} micro-batches so that sums keep their order; "
        f"with --grad-accum {micro_batches} the number of processes (--nproc-per-node times --nnodes) can be {good}"
    )
