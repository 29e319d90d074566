"""python -m benchmarks.overhead: microseconds that a call of each operation takes beside its arithmetic.

Each operation's smallest sample on one thread, where nearly all of the time is Python's and the extension's: without a
graph, with one, and forward and backward; and a step of AdamW, for each of a small model's parameters. The least of
many rounds counts: what a busy machine adds is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from gpt2_fast import AdamW, GPT2Config, GPT2LMHeadModel, ops
from gpt2_fast.report.machine import cpu_name, version

CALLS, ROUNDS = 200, 50


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """Of one call: the least of ROUNDS means over so many calls."""
    call()
    rounds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - started) / calls * 1e6)
    return min(rounds)


def _first(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def measure(room) -> tuple[float, float, float]:
    """(without a graph, with one, forward and backward) of a file of `gpt2_fast.ops`."""
    *tensors, options = next(iter(room.samples()))
    call = getattr(room, room.OP.name)
    leaves = [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    forward = lambda: call(*leaves, **options)
    upstream = torch.ones_like(_first(forward()))
    with torch.no_grad():
        plain = microseconds(forward)
    return plain, microseconds(forward), microseconds(lambda: _first(forward()).backward(upstream))


def optimizer_step() -> float:
    """Microseconds a parameter, of GPT-2's 148."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=12, n_head=1, n_embd=8, vocab_size=8, n_positions=8))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = AdamW(model.parameters(), clip_grad_norm=1.0)
    return microseconds(optimizer.step, calls=2) / len(list(model.parameters()))


def main() -> None:
    torch.set_num_threads(1)
    print(f"{cpu_name()}, torch {torch.__version__}, gpt2_fast {version('gpt2_fast')}; microseconds a call")
    print(f"{'':24}{'no graph':>10}{'graph':>10}{'and backward':>14}")
    for room in ops.rooms().values():
        if getattr(getattr(room, "OP", None), "gradients", None):
            print(f"{room.OP.name:24}" + "{:10.1f}{:10.1f}{:14.1f}".format(*measure(room)))
    print(f"{'adamw, a parameter':24}{optimizer_step():10.1f}")


if __name__ == "__main__":
    main()
