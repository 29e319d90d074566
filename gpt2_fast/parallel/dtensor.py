"""What `AdamW` does with DTensor parameters, those of `fully_shard` and `distribute_tensor`.

AdamW is element by element but for the norm of the gradients. So a rank updates the part of a parameter that it holds,
with the same part of its gradient, averages and master, and nothing is sent. The norm is of all gradients together:

    norm^2 = sum over parameters of the sum over mesh dimensions that shard them of |local gradient|^2

Along a dimension that replicates a parameter (HSDP has one) every rank holds the same part, which counts once. State
tensors are DTensors as their parameters are, so torch.distributed.checkpoint saves and loads them, on any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(param: DTensor, *others: Tensor | None) -> list[Tensor | None]:
    """This rank's parts of a parameter and of what belongs to it, which share its memory.

    A gradient that lies otherwise than its parameter is brought where that is.

    Raises ValueError for a parameter that is a sum over ranks, and TypeError for a whole tensor beside a sharded one.
    """
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"AdamW: a parameter {tuple(param.shape)} is placed as {param.placements}, as a sum over ranks; "
            "redistribute it to Shard or Replicate"
        )
    return [param.to_local(), *(None if t is None else _beside(param, t) for t in others)]


def _beside(param: DTensor, t: Tensor) -> Tensor:
    if not isinstance(t, DTensor):
        raise TypeError(
            f"AdamW: a parameter {tuple(param.shape)} is a DTensor and what belongs to it a whole tensor "
            f"{tuple(t.shape)}; make both DTensors"
        )
    if t.device_mesh != param.device_mesh or t.placements != param.placements:
        t = t.redistribute(param.device_mesh, param.placements)
    return t.to_local()


def spread(source: Tensor, param: Tensor) -> Tensor:
    """`source`, whole or a DTensor, as `param` is: whole, or a DTensor on its mesh with its placements."""
    if isinstance(param, DTensor):
        if isinstance(source, DTensor):
            return source.redistribute(param.device_mesh, param.placements)
        return distribute_tensor(source.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
    return source.full_tensor() if isinstance(source, DTensor) else source


def grad_norm(params: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together on every rank, float32 (float64 if one of them is).

    params: of the whole optimizer, in its order, so that all ranks send alike. Those that are no DTensors are the same
    on all ranks, and count once.

    Raises ValueError, on all ranks, where the gradients of those that are no DTensors are not the same.
    """
    params = list(params)
    _check_alike(params)
    wide = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    groups: dict[tuple, list[Tensor]] = {}
    for p in params:
        sharded = isinstance(p, DTensor)
        # A dimension of one rank has no one to ask.
        dims = [i for i, at in enumerate(p.placements) if not at.is_replicate()] if sharded else []
        key = (p.device_mesh, tuple(i for i in dims if p.device_mesh.size(i) > 1)) if dims else None
        grads = groups.setdefault(key, [])
        if p.grad is not None:
            grads.append(local(p, p.grad)[1] if sharded else p.grad)
    device = params[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for key, grads in groups.items():
        part = _sum_of_squares(grads, wide, device)
        if key is not None:
            mesh, dims = key
            part = part.to(_device_of(mesh, device))
            for dim in dims:
                dist.all_reduce(part, group=mesh.get_group(dim))
        total += part.to(device)
    return total.sqrt().to(wide)


def _check_alike(params: Sequence[Tensor]) -> None:
    """Raises ValueError where gradients outside of DTensors differ by rank, as those of parameters left unsharded do.

    One call for each dimension of a mesh, and none where all parameters are DTensors.
    """
    plain = [p for p in params if not isinstance(p, DTensor)]
    device = params[0].device
    if not plain or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    mesh = next(p.device_mesh for p in params if isinstance(p, DTensor))
    squares = _sum_of_squares([p.grad for p in plain if p.grad is not None], torch.float32, device)
    ends = torch.stack([squares, -squares]).to(_device_of(mesh, device))
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1:
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
    most, least = ends[0].item(), -ends[1].item()
    # Kernels that add in any order may round alike gradients apart; those of other data differ by far more.
    if most * (1 - 1e-4) > least:
        raise ValueError(
            "AdamW: a parameter is outside of fully_shard and its gradient differs by rank; call fully_shard(model) too"
        )


def _sum_of_squares(grads: Sequence[Tensor], wide: torch.dtype, device: torch.device) -> Tensor:
    """Of tensors that may be empty, a float64 scalar."""
    grads = [g for g in grads if g.numel()]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(grads, 2, dtype=wide)
    return torch.stack([n.to(device) for n in norms]).double().square().sum()


def _device_of(mesh, device: torch.device) -> torch.device:
    """Where ranks of a mesh talk to each other: not where parameters lie that are offloaded to the CPU."""
    if mesh.device_type == device.type:
        return device
    return torch.device(mesh.device_type, getattr(torch, mesh.device_type).current_device())
