"""Every way to wrap a model, under torch's own SGD, whose step is as long as the gradient: replicas do not drift."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from .setting import V, build, case, mine, sharded, whole


def _weights(model, ids) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return [whole(p) for p in model.parameters()]


def _as_one_process(wrap) -> dict[str, float]:
    ids = torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(_weights(wrap(build()), mine(ids)), _weights(build(), ids), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return {}


@case("own")
def sgd_ddp():
    return _as_one_process(DDP)


@case("own")
def sgd_ddp_that_looks_for_unused_parameters():
    return _as_one_process(lambda model: DDP(model, find_unused_parameters=True))


@case("own")
def sgd_ddp_of_a_static_graph():
    return _as_one_process(lambda model: DDP(model, static_graph=True))


@case("own")
def sgd_fsdp_root():
    return _as_one_process(lambda model: sharded(model, by="root"))


@case("own")
def sgd_fsdp_block():
    return _as_one_process(sharded)
