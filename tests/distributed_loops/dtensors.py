"""AdamW on DTensors of every placement, and its state on other ranks and in other optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from . import setting
from .setting import EPS, LR, batches, build, case, farthest, mine, optimizer_of, sharded, train, whole


def _plain_pair(shapes, placements, mesh, **options):
    """Parameters of these shapes on one process and as DTensors, with one optimizer each, after two steps."""
    generator = torch.Generator().manual_seed(3)
    values = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)]
    ours = [nn.Parameter(v.clone()) for v in values[0]]
    theirs = [nn.Parameter(distribute_tensor(v.clone(), mesh, at)) for v, at in zip(values[0], placements, strict=True)]
    optimizers = [optimizer_of(nn.ParameterList(side), **options) for side in (ours, theirs)]
    norms = []
    for grads in values[1:]:
        for p, q, g, at in zip(ours, theirs, grads, placements, strict=True):
            p.grad, q.grad = g.clone(), distribute_tensor(g.clone(), mesh, at)
        for optimizer in optimizers:
            optimizer.step()
        norms.append([optimizer.last_grad_norm.item() for optimizer in optimizers])
    error = max(farthest(p, q) for p, q in zip(ours, theirs, strict=True))
    return {"weight": error, "norm": max(abs(a - b) / a for a, b in norms)}


@case("own")
def dtensors():
    """Rows by either dimension, a parameter of which a rank has nothing, one of no elements, and a replicated one."""
    mesh, shapes = init_device_mesh("cpu", (2,)), [(7, 5), (6, 9), (1, 4), (0, 3), (5,), ()]
    placements = [[Shard(0)], [Shard(1)], [Shard(0)], [Shard(0)], [Replicate()], [Replicate()]]
    return _plain_pair(shapes, placements, mesh)


@case("own")
def dtensors_by_reference():
    mesh = init_device_mesh("cpu", (2,))
    return _plain_pair([(7, 5), (1, 4), (5,)], [[Shard(0)], [Shard(0)], [Replicate()]], mesh, impl="reference")


@case("own")
def dtensors_that_do_not_fit():
    mesh = init_device_mesh("cpu", (2,))
    summed = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    summed.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with pytest.raises(ValueError, match="as a sum over ranks"):
        optimizer_of(nn.ParameterList([summed])).step()
    # A gradient that lies otherwise is brought to its parameter.
    found = []
    for at in (Shard(0), Replicate(), Shard(1)):
        p = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.arange(24.0).view(4, 6), mesh, [at])
        optimizer = optimizer_of(nn.ParameterList([p]))
        optimizer.step()
        found.append((whole(p), optimizer.last_grad_norm.item()))
    assert all(torch.equal(found[0][0], w) and found[0][1] == n for w, n in found), found
    return {}


@case("own")
def state_goes_on_anywhere():
    """The state of sharded ranks in one process's torch.optim.AdamW, and back into other shards: the same next step."""
    model = sharded(build())
    optimizer = optimizer_of(model, clip_grad_norm=1e9)
    train(model, optimizer)
    options = StateDictOptions(full_state_dict=True)
    weights, state = (
        get_model_state_dict(model, options=options),
        get_optimizer_state_dict(model, optimizer, options=options),
    )
    assert all(not isinstance(t, DTensor) for s in state["state"].values() for t in s.values())
    ids = batches()[0]

    single = build()
    single.load_state_dict(weights)
    theirs = torch.optim.AdamW(single.parameters(), lr=LR, eps=EPS, weight_decay=0.1)
    set_optimizer_state_dict(single, theirs, copy.deepcopy(state), options=options)  # torch's keeps what it is given
    single(ids, labels=ids).loss.backward()
    theirs.step()

    other = build()
    other.load_state_dict(weights)
    other = sharded(other, by="root")
    resumed = optimizer_of(other, clip_grad_norm=1e9)
    set_optimizer_state_dict(other, resumed, state, options=options)
    copied = optimizer_of(model, clip_grad_norm=1e9)
    copied.load_state_dict(optimizer.state_dict())  # DTensors into DTensors
    assert all(isinstance(copied.state[p]["exp_avg"], DTensor) for p in model.parameters())
    found = {}
    for name, m, o in (("resumed", other, resumed), ("copied", model, copied)):
        o.zero_grad()
        m(mine(ids), labels=mine(ids)).loss.backward()
        o.step()
        found[name] = max(farthest(a, b) for a, b in zip(m.parameters(), single.parameters(), strict=True))
    plain = optimizer_of(build())
    plain.load_state_dict(optimizer.state_dict())  # DTensors into whole tensors
    return found


@case("own")
def state_by_torch_distributed_checkpoint():
    import torch.distributed.checkpoint as dcp

    model = sharded(build())
    optimizer = optimizer_of(model)
    train(model, optimizer)
    folder = setting.folder / "dcp"
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    other = sharded(build(), by="root")
    resumed = optimizer_of(other)
    state = {"model": get_model_state_dict(other), "optimizer": get_optimizer_state_dict(other, resumed)}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, resumed, state["optimizer"])
    ids = batches()[1]
    for m, o in ((model, optimizer), (other, resumed)):
        o.zero_grad()
        m(mine(ids), labels=mine(ids)).loss.backward()
        o.step()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return {"weight": max(farthest(a, b) for a, b in pairs)}


@case("own")
def a_grad_scaler():
    """An overflow on one rank alone is left out by both, and the others' steps are one process's."""
    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(3)
    shapes, places = [(7, 5), (1, 4), (5,)], [[Shard(0)], [Shard(0)], [Replicate()]]
    values = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(6)]
    values[3][0][6, 4] = torch.inf  # of the second rank's rows
    sides, scalers = [], [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in range(2)]
    for spread in (False, True):
        put = (lambda v, at: distribute_tensor(v.clone(), mesh, at)) if spread else (lambda v, at: v.clone())
        params = [nn.Parameter(put(v, at)) for v, at in zip(values[0], places, strict=True)]
        optimizer, scaler, scales = optimizer_of(nn.ParameterList(params)), scalers[spread], []
        scaler.scale(torch.ones(()))
        for grads in values[1:]:
            for p, g, at in zip(params, grads, places, strict=True):
                p.grad = put(g * scaler.get_scale(), at)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        sides.append((params, scales, [optimizer.state[p]["step"].item() for p in params]))
    (ours, scales, counts), (theirs, spread_scales, spread_counts) = sides
    assert scales == spread_scales == [8.0, 16.0, 8.0, 8.0, 16.0], (scales, spread_scales)
    assert counts == spread_counts == [4.0] * 3, (counts, spread_counts)
    return {"weight": max(farthest(p, q) for p, q in zip(ours, theirs, strict=True))}
