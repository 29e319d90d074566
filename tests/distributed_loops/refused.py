"""What a rank's AdamW cannot see of the others, and refuses where it takes a norm."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

from gpt2_fast import AdamW

from .setting import (
    CLIP,
    EPS,
    LR,
    alone,
    apart,
    batches,
    build,
    build_nanogpt,
    case,
    loss_of,
    mean,
    mine,
    optimizer_of,
    run,
    whole,
)


def refuses(step, words: str, model) -> None:
    """`step` raises one line and changes no weight."""
    before = [whole(p).clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=words) as raised:
        step()
    assert "\n" not in str(raised.value)
    assert all(torch.equal(whole(p), old) for p, old in zip(model.parameters(), before, strict=True))


@case("own")
def fsdp1():
    """Both of its kinds of parameters: with a norm refused, without one as ever."""
    for original in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            model = FullyShardedDataParallel(build(), device_id=torch.device("cpu"), use_orig_params=original)
        optimizer = optimizer_of(model)
        model(mine(batches()[0]), labels=mine(batches()[0])).loss.backward()
        refuses(
            optimizer.step,
            "use fully_shard .FSDP2., or leave out clip_grad_norm and grad_scale, and call scaler.unscale_",
            model,
        )
        assert not any(state["step"] for state in optimizer.state.values())
        optimizer.clip_grad_norm = None
        refuses(lambda: optimizer.step(grad_scale=torch.ones(())), "FSDP1", model)  # noqa: B023
        optimizer.step()
    return {}


@case("own")
def fsdp_blocks_alone():
    """Plain parameters whose gradients differ by rank are refused on all ranks; averaged by hand, they count once."""
    model = build()
    for block in model.transformer.h:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    optimizer = optimizer_of(model)
    loss_of(model, mine(batches()[0])).backward()
    refuses(
        optimizer.step, "^AdamW: a parameter is outside of fully_shard and its gradient differs by rank; call", model
    )
    losses, norms = [], []
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(model, mine(batch))
        loss.backward()
        for p in model.parameters():
            if not isinstance(p, DTensor):
                dist.all_reduce(p.grad)
                p.grad /= 2
        optimizer.step()
        losses.append(mean(loss))
        norms.append(optimizer.last_grad_norm.item())
    return apart(losses, norms, [whole(p) for p in model.parameters()], alone())


@case("own")
def ddp_before_cast():
    """DDP's buckets would stay float32, and each rank go its own way."""
    model = DDP(build())
    optimizer = optimizer_of(model)
    words = "^AdamW: the model is DistributedDataParallel's already.*call cast.. on the model before"
    refuses(lambda: optimizer.cast(model, torch.bfloat16), words, model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not optimizer.state
    return {}


@case("own")
def zero():
    """Refused where a norm is taken, and by advice that works: torch's own clipping before the step."""
    model = DDP(build())
    make = functools.partial(ZeroRedundancyOptimizer, list(model.parameters()), lr=LR, eps=EPS, weight_decay=0.1)
    words = "^AdamW: ZeroRedundancyOptimizer gives each rank some of the parameters.*clip_grad_norm_.model.parameters"
    with pytest.raises(ValueError, match=words):
        make(optimizer_class=AdamW, clip_grad_norm=CLIP)
    optimizer = make(optimizer_class=functools.partial(AdamW, clip_grad_norm=CLIP))
    loss_of(model, mine(batches()[0])).backward()
    refuses(optimizer.step, words, model)
    optimizer, losses, norms = make(optimizer_class=AdamW), [], []
    refuses(lambda: optimizer.step(grad_scale=torch.ones(())), words, model)
    for batch in batches():
        model.zero_grad()
        loss = loss_of(model, mine(batch))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(mean(loss))
    return apart(losses, norms, [whole(p) for p in model.parameters()], alone())


def tied_head_of_two_parameters(make) -> dict[str, float]:
    """Refused where steps would move head and embedding apart; as one process by what the refusal asks for."""
    mesh, ids = init_device_mesh("cpu", (2,)), batches()[0]
    table = {"transformer.wte": RowwiseParallel(input_layouts=Replicate())}
    head = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    words = "^lm_head.weight and transformer.wte.weight are tied and now two parameters, .*then assign lm_head.weight ="
    model = parallelize_module(make(), mesh, table)
    refuses(lambda: loss_of(model, ids), words, model)
    model = parallelize_module(make(), mesh, {**table, **head})
    refuses(lambda: loss_of(model, ids), "move apart: assign lm_head.weight = transformer.wte.weight before", model)
    model.lm_head.weight = model.transformer.wte.weight
    return run(model, make=make, rows=lambda batch: batch)


@case("own")
def a_tied_head_of_two_parameters():
    return tied_head_of_two_parameters(build)


@case("own")
def a_tied_head_of_two_parameters_nanogpt():
    return tied_head_of_two_parameters(build_nanogpt)
