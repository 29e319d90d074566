"""The part of AdamW's state that a process holds: 1 / W of it (ZeRO stage 1, Rajbhandari et al. 2020).

All parameters lie in one buffer, so that one call gathers what the processes have updated.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2_fast.ops.adamw import adamw, left_out, take_written
from gpt2_fast.ops.adamw_contract import Lists, check_shape, unsupported
from gpt2_fast.ops.adamw_kept import Kept
from gpt2_fast.ops.adamw_squares import chunk_squares
from gpt2_fast.ops.runtime.dispatch import LOW_PRECISION
from gpt2_fast.parallel import tree
from gpt2_fast.parallel.flat import Layout
from gpt2_fast.parallel.gradients import GradientSum
from gpt2_fast.parallel.group import Group

State = dict[str, Tensor]


class Shards:
    """The shard of this process.

    The parameters become views of `weights`; states are freed as they are cut.

    Args:
        params: what `check_shareable` takes.
        groups: for each parameter, its row of AdamW's hyperparameters.
        states: for each parameter, AdamW's state of it so far, whole; {} for none.
        group: the processes.
        micro_batches: of a step, on all processes.

    Attributes:
        states: for each parameter, its step count and, of averages and master, what lies in this shard: with the
            parameter's shape where that is all of it, else [n].
        weights: [layout.length], all parameters.
        norm: of the last step's gradients, float32 []; the same tensor every time, which a CUDA graph reads.

    Raises:
        ValueError: processes with other weights.
    """

    def __init__(
        self, params: Sequence[Tensor], groups: Sequence[int], states: Sequence[State], group: Group, micro_batches: int
    ):
        self._params, self._groups, self._group = list(params), list(groups), group
        first = params[0]
        self._low = first.dtype in LOW_PRECISION
        self.layout = Layout([p.numel() for p in params], group.world)
        begin = group.rank * self.layout.shard
        self._pieces = list(self.layout.pieces(begin, begin + self.layout.shard))
        self._kept = Kept()
        self.weights = torch.zeros(self.layout.length, dtype=first.dtype, device=first.device)
        for p, offset in zip(params, self.layout.offsets, strict=True):
            view = self.weights[offset : offset + p.numel()].view(p.shape)
            p.data = view.copy_(p)
        self._own = self.weights[begin : begin + self.layout.shard]
        floats = {"dtype": torch.float32, "device": first.device}
        keys = ("exp_avg", "exp_avg_sq", *(("master",) if self._low else ()))
        self._held = {key: torch.zeros(self.layout.shard, **floats) for key in keys}
        if self._low:
            self._held["master"].copy_(self._own)
        self.states: list[State] = [{"step": s.pop("step", torch.zeros((), **floats))} for s in states]
        for key, held in self._held.items():
            for piece in self._pieces:
                n, p = piece.stop - piece.start, params[piece.index]
                view = held[piece.at : piece.at + n]
                if key in states[piece.index]:
                    view.copy_(states[piece.index][key].reshape(-1)[piece.start : piece.stop])
                self.states[piece.index][key] = view.view(p.shape) if n == p.numel() else view
            for state in states:
                state.pop(key, None)
        group.same(_digest(self.weights), "the processes begin with other weights; give all of them the same options")
        self.gradients = GradientSum(params, self.layout, micro_batches // group.world, group)
        self._gradient: Tensor | None = None
        self.norm = torch.zeros((), **floats)

    def accumulate(self) -> None:
        """Adds the gradients that are there, of one micro-batch, and frees them."""
        grads = [p.grad for p in self._params]
        for p, grad in zip(self._params, grads, strict=True):
            if grad is None or grad.is_sparse:
                what = "no gradient" if grad is None else "a sparse gradient"
                raise ValueError(f"AdamW: a parameter {tuple(p.shape)} has {what}; a shared step takes one of each")
        self.gradients.add(grads)
        for p in self._params:
            p.grad = None

    def check_held(self, params: Sequence[Tensor]) -> None:
        """Raises ValueError unless `params` are those that were shared out, where they were put, and without gradients.

        A parameter that was given other memory would stay as it is: the buffer is what a step changes.
        """
        if len(params) != len(self._params) or any(a is not b for a, b in zip(params, self._params, strict=True)):
            raise ValueError("AdamW: param_groups have other parameters than at shard(); make another optimizer")
        begin, itemsize = self.weights.data_ptr(), self.weights.element_size()
        for p, offset in zip(params, self.layout.offsets, strict=True):
            if p.dtype != self.weights.dtype or (p.numel() and p.data_ptr() != begin + offset * itemsize):
                raise ValueError(
                    f"AdamW: a parameter {tuple(p.shape)} was moved, cast or assigned after shard(); write into it, as "
                    "load_state_dict without assign does"
                )
            if p.grad is not None:
                raise ValueError(
                    f"AdamW: a parameter {tuple(p.shape)} has a gradient that is not added up; call accumulate() after "
                    "each backward"
                )

    def reduce(self, with_norm: bool, impl: str, grad_scale: Tensor | None) -> None:
        """Brings the sum of its shard to each process, and to `norm` that of all gradients, divided by grad_scale."""
        self._gradient = self.gradients.reduce()
        if not with_norm:
            return
        squares = self._group.gather(chunk_squares(self._gradient, impl))
        norm = tree.balanced(squares[: self.layout.chunks]).sqrt().float()
        self.norm.copy_(norm if grad_scale is None else norm / grad_scale)

    def update(
        self, hyper: Tensor, max_norm: float | None, impl: str, grad_scale: Tensor | None = None
    ) -> Tensor | None:
        """One AdamW step of this shard, with `norm`. Returns whether it was left out, see `AdamW.last_found_inf`."""
        steps = [state["step"] for state in self.states]
        torch._foreach_add_(steps, 1.0)
        norm = None if max_norm is None else self.norm
        # Gradients are float32, so a low-precision weight's master is updated as a float32 weight is, and then rounded.
        wide, lists = self._held["master"] if self._low else self._own, Lists.empty()
        if self._low:
            piece = 1 << (18 if wide.device.type == "cpu" else 22)  # elements: what is made of them stays small
            for master, own in zip(wide.split(piece), self._own.split(piece), strict=True):
                take_written(master, own)
        for index, start, stop, at in self._pieces:
            part = slice(at, at + stop - start)
            m, v = (self._held[key][part] for key in ("exp_avg", "exp_avg_sq"))
            step, group = self.states[index]["step"], self._groups[index]
            lists.append(wide[part], self._gradient[part], m, v, None, step, group)
        adamw(*lists, hyper, max_norm=max_norm, norm=norm, grad_scale=grad_scale, impl=impl, kept=self._kept)
        if (skipped := left_out(norm, grad_scale, None)) is not None:
            torch._foreach_sub_(steps, skipped)
        if self._low:
            self._own.copy_(wide)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(self._params)
        return skipped

    def gather(self) -> None:
        """Brings the updated weights of every shard to every process."""
        self._group.gather_in_place(self.weights)

    def whole(self) -> list[State] | None:
        """For each parameter its whole state, in the first process; None in the others, which send theirs.

        The first process gets it in host memory, where it takes its own size and one piece more. Every process must
        call it. Alone, a process gets the state itself.
        """
        if self._group.world == 1:
            return [dict(state) for state in self.states]
        whole = None
        if self._group.first:
            # A copy of the count, too: what is made here is written while the next steps add to the count itself.
            whole = [
                {
                    "step": state["step"].to("cpu", copy=True),
                    **{key: torch.empty(p.shape, dtype=torch.float32, device="cpu") for key in self._held},
                }
                for p, state in zip(self._params, self.states, strict=True)
            ]
        for rank in range(self._group.world):
            for key, held in self._held.items():
                for begin, part in self._group.send_first(held, rank):
                    begin += rank * self.layout.shard
                    for index, start, stop, at in self.layout.pieces(begin, begin + len(part)):
                        whole[index][key].view(-1)[start:stop].copy_(part[at : at + stop - start])
        return whole

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Takes the first process's weights and, for each parameter, the first process's whole state.

        What is not in it: averages are zeros, a master is the weight. Every process must call it; what the others
        give is not read.

        Raises ValueError for a shape that is not the parameter's.
        """
        for i, (p, state) in enumerate(zip(self._params, states, strict=True)):
            for key in self._held:
                if key in state:
                    check_shape(key, i, state[key], p)
        self._group.broadcast_from_first(self.weights)
        for key, held in self._held.items():
            held.copy_(self._own) if key == "master" else held.zero_()
        counts, there = self._group.decide(
            lambda: ([float(s.get("step", 0.0)) for s in states], [[key in s for key in self._held] for s in states])
        )
        mine = {piece.index: piece for piece in self._pieces}
        for i, p in enumerate(self._params):
            self.states[i]["step"].fill_(counts[i])
            for key, present in zip(self._held, there[i], strict=True):
                if not present:
                    continue
                if self._group.first:
                    flat = states[i][key].detach().to("cpu", torch.float32).contiguous().view(-1)
                else:
                    flat = torch.empty(p.numel(), dtype=torch.float32, device="cpu")
                self._group.broadcast_from_first(flat)
                if i in mine:
                    _, start, stop, at = mine[i]
                    self._held[key][at : at + stop - start].copy_(flat[start:stop])


def check_shareable(params: Sequence[Tensor]) -> None:
    """Raises ValueError, one line, for parameters of which `Shards` can make no one buffer."""
    dtypes = {p.dtype for p in params}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype)[6:] for dtype in dtypes))
        raise ValueError(f"AdamW: parameters are {names}; processes share those of one dtype")
    for p in params:
        if reason := unsupported(p):
            raise ValueError(f"AdamW: processes cannot share a parameter {tuple(p.shape)}: {reason}")
    # Each gets a place of its own in the buffer, which would untie them.
    at = sorted((p.data_ptr(), p.numel() * p.element_size(), tuple(p.shape)) for p in params if p.numel())
    for (begin, size, shape), (following, _, _) in itertools.pairwise(at):
        if begin + size > following:
            raise ValueError(f"AdamW: a parameter {shape} shares memory with another; pass each once")


def _digest(flat: Tensor) -> int:
    """A number that changes with every element and its place, modulo 2^64: integers have one sum in any order."""
    total = 0
    for begin in range(0, len(flat), 1 << 22):
        words = flat[begin : begin + (1 << 22)].view(torch.int16).to(torch.int64)
        place = torch.arange(len(words), device=flat.device) + begin
        total += int((words * (2 * place + 1)).sum())
    return total % 2**64
