"""Whose is the gradient that came into a backward? In its place something may be added only if it is no one else's.

A gradient may be the user's (torch.autograd.grad's grad_outputs), kept by a hook, wanted by torch.autograd.grad
itself, or on its way to another function as well. Each of them holds a reference: to the Python object, to the
tensor or, through a view, to its storage. torch decides in the same way whether it may keep a gradient as `.grad`.
How many references the engine has itself is measured, not assumed: it differs between versions.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor


def holders(grad: Tensor) -> tuple[int, int, int]:
    """References to the Python object, the tensor and its storage. To be called by a backward on its argument."""
    return sys.getrefcount(grad), grad._use_count(), torch._C._storage_Use_Count(grad.untyped_storage()._cdata)


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone(), x.detach()

    @staticmethod
    def backward(ctx, dy, dz):
        ctx.seen.append(holders(dz))
        return None, None


@functools.cache
def sole_holders() -> tuple[int, int, int]:
    """What `holders` says of a gradient that only the engine and the running backward have.

    Runs a graph of two numbers at its first call.
    """
    seen: list[tuple[int, int, int]] = []
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(2, device="cpu", requires_grad=True)
        (_Probe.apply(x, seen)[1] * 3).sum().backward()
    return seen[0]
