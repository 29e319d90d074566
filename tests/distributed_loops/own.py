"""A loop of one's own: DistributedDataParallel and fully_shard, plain, accumulating, recomputing, in bfloat16."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from gpt2_fast.evaluate import perplexity
from gpt2_fast.model import GPT2Block, GPT2LMHeadModel

from .setting import (
    CLIP,
    alone,
    apart,
    batches,
    build,
    build_nanogpt,
    case,
    is_tied,
    loss_of,
    mine,
    optimizer_of,
    run,
    sharded,
    train,
    whole,
)


@case("own")
def ddp():
    return run(DDP(build()))


@case("own")
def ddp_no_sync():
    model = DDP(build())
    return run(model, parts=2, quiet=model.no_sync)


@case("own")
def ddp_bfloat16():
    """Weights and gradients in bfloat16, masters in float32."""
    model = build()
    optimizer = optimizer_of(model)
    optimizer.cast(model, torch.bfloat16)
    return run(DDP(model), expected=alone(dtype=torch.bfloat16), optimizer=optimizer)


@case("own")
def ddp_recompute():
    model = build()
    model.gradient_checkpointing_enable()
    return run(DDP(model))


@case("own")
def ddp_nanogpt():
    return run(DDP(build_nanogpt()), make=build_nanogpt)


@case("own")
def fsdp_root():
    model = sharded(build(), by="root")
    found = run(model)
    is_tied(model)
    return found


@case("own")
def fsdp_block():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that a block returns a view
        model = sharded(build())
        found = run(model)
    is_tied(model)
    return found


@case("own")
def fsdp_accumulate():
    model = sharded(build())

    class Quiet(nullcontext):
        def __enter__(self):
            model.set_requires_gradient_sync(False)

        def __exit__(self, *_):
            model.set_requires_gradient_sync(True)

    return run(model, parts=2, quiet=Quiet)


@case("own")
def fsdp_hybrid():
    """Replicated over two ranks, sharded over one: a gradient that all ranks hold counts once."""
    return run(sharded(build(), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))))


@case("own")
def fsdp_untied():
    make = functools.partial(build, tie_word_embeddings=False)
    return run(sharded(make()), make=make)


@case("own")
def fsdp_nanogpt():
    model = sharded(build_nanogpt())
    found = run(model, make=build_nanogpt)
    is_tied(model)
    return found


@case("own")
def fsdp_recompute():
    model = build()
    model.gradient_checkpointing_enable()
    return run(sharded(model))


@case("own")
def fsdp_checkpoint_wrapper():
    model = build()
    apply_activation_checkpointing(model, checkpoint_wrapper, lambda module: isinstance(module, GPT2Block))
    return run(sharded(model))


@case("own")
def fsdp_bfloat16():
    """Cast when it is sharded already: the float32 shards stay as masters."""
    model = sharded(build())
    optimizer = optimizer_of(model)
    optimizer.cast(model, torch.bfloat16)
    found = run(model, expected=alone(dtype=torch.bfloat16), optimizer=optimizer)
    states = [optimizer.state[p] for p in model.parameters()]
    assert all(isinstance(s["master"], DTensor) and s["master"].dtype == torch.float32 for s in states)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    return found


@case("own")
def fsdp_written():
    """Weights that are written after a step are what the next begins from."""
    model = sharded(build())
    optimizer = optimizer_of(model)
    optimizer.cast(model, torch.bfloat16)
    found = run(model, expected=alone(dtype=torch.bfloat16), optimizer=optimizer)
    params = [p for p in model.parameters() if p.grad is not None]
    for p in params:
        p.to_local().data.mul_(0.5).view(-1)[::2].zero_()
    before = [p.to_local().clone() for p in params]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p.to_local(), old)
        assert torch.equal(optimizer.state[p]["master"].to_local(), old.float())
    assert params
    return found


class Rounded(nn.Module):
    """A model that computes with its float32 weights rounded to bfloat16, as FSDP2's param_dtype has it."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        weights = {name: p.bfloat16() for name, p in self.module.named_parameters()}
        return torch.func.functional_call(self.module, weights, args, kwargs)


def _alone_mixed(make):
    model = Rounded(make())
    begin = [whole(p).clone() for p in model.parameters()]
    optimizer = optimizer_of(model)

    losses, norms = train(model, optimizer, rows=lambda batch: batch)
    return losses, norms, [whole(p) for p in model.parameters()], optimizer, begin


@case("own")
def fsdp_mixed_precision():
    model = sharded(build(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    found = run(model, expected=_alone_mixed(build))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return found


@case("own")
def fsdp_mixed_precision_nanogpt():
    """Layers without a bias: the zeros that operations take have the weights' dtype of the moment."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return run(sharded(build_nanogpt(), mp_policy=policy), expected=_alone_mixed(build_nanogpt))


@case("own")
def pipeline_clips_by_the_norm_of_all_stages():
    """The lines of docs/distributed-loops.md. A rank steps its stage alone, and gets the other's weights from there."""
    make = functools.partial(build, tie_word_embeddings=False)
    model, stages = make(), dist.group.WORLD
    body = model.transformer
    halves = [nn.ModuleList([body.wte, body.wpe, body.h[0]]), nn.ModuleList([body.h[1], body.ln_f, model.lm_head])]
    stage = halves[dist.get_rank()]
    optimizer = optimizer_of(stage, clip_grad_norm=None)
    losses, norms = [], []
    for batch in batches():
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in stage.parameters()])
        squares = norm.square()
        dist.all_reduce(squares, group=stages)
        torch.nn.utils.clip_grads_with_norm_(stage.parameters(), CLIP, squares.sqrt())
        optimizer.step()
        for rank, half in enumerate(halves):
            for p in half.parameters():
                dist.broadcast(p.detach(), rank)
        losses.append(loss.item())
        norms.append(squares.sqrt().item())
    return apart(losses, norms, [whole(p) for p in model.parameters()], alone(make))


@case("own")
def fsdp_logits():
    """What is read later is the head of its own forward, or refused."""
    expected = build()
    for reshard in (False, True):
        model, ids = sharded(build(), reshard_after_forward=reshard), batches()[0]
        with torch.no_grad():
            logits = expected(ids).logits
            torch.testing.assert_close(model(ids, labels=ids).logits, logits, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-6)
        output = model(ids, labels=ids)
        if reshard:
            refuses(output, "the head is sharded again")
        else:
            torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-6)
        output, optimizer = model(ids, labels=ids), optimizer_of(model)
        output.loss.backward()
        refuses(output, "the head is sharded again")
        optimizer.step()
        model(ids, labels=ids)  # the same memory, other weights
        refuses(output, "the head is sharded again" if reshard else "was called again")
    return {}


@case("own")
def fsdp_outside_of_forward():
    """What reads weights that are shards is refused in one line, and the way out that it names gives the same."""
    model, whole_model, ids = sharded(build()), build(), batches()[0][:, :8]
    calls = {
        "generate": lambda m: m.generate(ids, max_new_tokens=2, do_sample=False),
        "perplexity": lambda m: torch.tensor(perplexity(m, ids.flatten())["loss"]),
        "GPT2Model": lambda m: m.transformer(ids),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: the model is sharded by .*get_model_state_dict") as raised:
            call(model)
        assert "\n" not in str(raised.value)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    torch.manual_seed(1)
    gathered = GPT2LMHeadModel(model.config)
    gathered.load_state_dict(state)
    for call in calls.values():
        assert torch.equal(call(gathered), call(whole_model))
    return {}


@case("own")
def fsdp_of_two_dtypes():
    """Parts of one model in two dtypes, and hidden states that the policy casts: the line says what to change."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    wide = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    mesh, ids = init_device_mesh("cpu", (2,)), mine(batches()[0])
    for of_blocks, of_root in ((half, MixedPrecisionPolicy()), (MixedPrecisionPolicy(), half), (wide, wide)):
        model = build()
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=of_blocks)
        fully_shard(model, mesh=mesh, mp_policy=of_root)
        with pytest.raises(ValueError, match="under FSDP2: one param_dtype for all modules, and no other output_dtype"):
            loss_of(model, ids)
    return {}


def refuses(output, words: str) -> None:
    with pytest.raises(RuntimeError, match=words) as raised:
        output.logits  # noqa: B018
    assert "\n" not in str(raised.value)
