"""One process of `python -m benchmarks scale`, started by torchrun: its last line on stdout is what rank 0 measured.

Steps are counted first as they are. Then a few more are taken with a clock around everything that processes send each
other, which a GPU has to be waited for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from benchmarks.measure import clock, peak_bytes
from benchmarks.programs import SIZES
from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.ops.runtime.memory import retain_memory
from gpt2_fast.parallel.group import Group, join, leave
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.processes import local_device
from gpt2_fast.train.step import Step, build_optimizer, micro_batches


class Traffic:
    """Bytes that this process sends, and its seconds: waiting for the others, and sending."""

    def __init__(self, device: str):
        self.device, self.sent, self.waited, self.seconds = device, 0, 0.0, 0.0

    @contextmanager
    def watch(self, group: Group) -> Iterator[None]:
        """Counts what goes through `group` meanwhile."""
        others = group.world - 1
        # What goes to other processes: of an exchange all rows but one, of a gathering the own part to each of them.
        sizes = {
            "exchange": lambda received, sent: sent.nbytes * others // group.world,
            "gather": lambda part: part.nbytes * others,
            "gather_in_place": lambda whole: whole.nbytes * others // group.world,
        }
        for name, size in sizes.items():
            setattr(group, name, self._counted(group, getattr(group, name), size))
        try:
            yield
        finally:
            for name in sizes:
                delattr(group, name)

    def _counted(self, group: Group, call, size):
        def counted(*tensors):
            if group.world == 1:
                return call(*tensors)
            started = clock(self.device)
            group.barrier()
            ready = clock(self.device)
            result = call(*tensors)
            self.seconds += clock(self.device) - ready
            self.waited += ready - started
            self.sent += size(*tensors)
            return result

        return counted


def measure(options: argparse.Namespace, group: Group) -> dict:
    """What this process has measured."""
    device = local_device(options.device)
    if device.type == "cpu":
        retain_memory()
    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), options.dropout)
    model = GPT2LMHeadModel(GPT2Config(**SIZES[options.model], **dropout)).to(device).train()
    config = TrainConfig(
        batch_size=options.batch_size, grad_accum=options.grad_accum, dtype=options.dtype, device=options.device,
        compile_graph=options.compile_graph,
    )  # fmt: skip
    optimizer = build_optimizer(model, config, group)
    step = Step(model, optimizer, config, options.context, group)
    shape = (options.grad_accum, options.batch_size, options.context + 1)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    mine = tokens[micro_batches(config, group)]
    batch = mine[..., :-1].contiguous().to(device), mine[..., 1:].contiguous().to(device)
    losses, kind = [], device.type

    def take() -> None:
        losses.append(step(*batch, 1e-4, len(losses)))

    for _ in range(options.warmup):
        take()
    group.barrier()
    started = clock(kind)
    for _ in range(options.steps):
        take()
    group.barrier()
    seconds, traffic = clock(kind) - started, Traffic(kind)
    peak = peak_bytes(kind)  # of the steps as they are
    started = clock(kind)
    with traffic.watch(group):
        for _ in range(options.steps):
            take()
    watched = clock(kind) - started
    state = sum(t.nbytes for of_one in optimizer.state.values() for t in of_one.values())
    return {
        "seconds": seconds / options.steps, "watched": watched / options.steps, "sent": traffic.sent // options.steps,
        "waited": traffic.waited / options.steps, "sending": traffic.seconds / options.steps,
        "peak_bytes": peak, "state_bytes": state, "losses": [float(loss) for loss in losses],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("batch-size", "grad-accum", "context", "warmup", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("model", "dtype", "device"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--compile-graph", action="store_true")
    options = parser.parse_args()
    group = join(minutes=10)
    own, everyone = measure(options, group), [None] * group.world
    if group.world > 1:
        dist.all_gather_object(everyone, own)
    else:
        everyone = [own]
    if group.first:
        slowest = max(everyone, key=lambda one: one["seconds"])
        largest = {key: max(one[key] for one in everyone) for key in ("peak_bytes", "state_bytes", "sent")}
        print(json.dumps({**slowest, **largest}), flush=True)
    leave()


if __name__ == "__main__":
    main()
