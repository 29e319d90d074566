"""The sum of a step's gradients: a process adds up its micro-batches, then each gets the whole sum of its shard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2_fast.parallel import tree
from gpt2_fast.parallel.flat import Layout
from gpt2_fast.parallel.group import Group


class GradientSum:
    """Adds gradients up in float32, in the order of `tree`.

    A partial sum is one buffer of all parameters, kept from step to step: `tree.depth` of them, at least two where
    something is received. Which buffer holds what depends on nothing but the count of micro-batches, so a CUDA graph
    of the additions fits those outside of it.

    Args:
        params: whose gradients are added.
        layout: of the buffers, as of the parameters.
        count: micro-batches of this process in a step.
        group: the processes.

    Attributes:
        added: how many micro-batches of this step are in it.
    """

    def __init__(self, params: Sequence[Tensor], layout: Layout, count: int, group: Group):
        self._params, self._layout, self.count, self._group = list(params), layout, count, group
        self._buffers: list[tuple[Tensor, list[Tensor]]] = []
        self._height = 0  # partial sums that there are now
        self.added = 0

    def _buffer(self, i: int) -> tuple[Tensor, list[Tensor]]:
        """float32 [layout.length], zeros where no parameter is, and its views with the parameters' shapes."""
        while len(self._buffers) <= i:
            flat = torch.zeros(self._layout.length, dtype=torch.float32, device=self._params[0].device)
            places = zip(self._params, self._layout.offsets, strict=True)
            self._buffers.append((flat, [flat[at : at + p.numel()].view(p.shape) for p, at in places]))
        return self._buffers[i]

    def add(self, grads: Sequence[Tensor]) -> None:
        """The gradients of the next micro-batch, one a parameter, in any floating dtype."""
        if self.added == self.count:
            raise ValueError(f"AdamW: a step has {self.count} micro-batches here and this is one more; call step()")
        done = tree.merges(self.added, self.count)
        if done:  # a leaf is added to what is on its left, and has no buffer of its own
            torch._foreach_add_(self._buffer(self._height - 1)[1], list(grads))
        else:
            torch._foreach_copy_(self._buffer(self._height)[1], list(grads))
            self._height += 1
        for _ in range(done - 1):
            self._height -= 1
            # Parameter by parameter: between them, where `reduce` has received other numbers, zeros are to stay.
            torch._foreach_add_(self._buffer(self._height - 1)[1], self._buffer(self._height)[1])
        self.added += 1

    def check_whole(self) -> None:
        """Raises ValueError unless all micro-batches of a step are in it. The next one begins a new step."""
        if self.added != self.count:
            raise ValueError(
                f"AdamW: {self.added} of {self.count} micro-batches are added up; call accumulate() after each backward"
            )
        self.forget()

    def forget(self) -> None:
        """The next micro-batch is the first of a step."""
        self.added = self._height = 0

    def reduce(self) -> Tensor:
        """The sum over the micro-batches of all processes, float32 [layout.shard], of this process's shard.

        It lies in a buffer that the next `add` writes over.
        """
        mine = self._buffer(0)[0]
        if self._group.world == 1:
            return mine
        received = self._buffer(1)[0]
        self._group.exchange(received, mine)
        return tree.total(received.view(self._group.world, -1))
