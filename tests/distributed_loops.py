"""What tests/test_distributed_loops.py runs in processes of its own: `python distributed_loops.py GROUP FOLDER`.

Every rank runs the functions of a group, in order, and leaves {name: numbers} in FOLDER/RANK.json. A number is how far
the ranks together are from one process that trains on the whole batch, which every rank works out for itself.
"""

from __future__ import annotations

import copy
import datetime
import functools
import json
import os
import sys
import time
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from gpt2_fast import AdamW, GPT2Config, GPT2LMHeadModel
from gpt2_fast.hf_patch import swap
from gpt2_fast.model import GPT2Block
from gpt2_fast.nanogpt import GPT, GPTConfig

STEPS, B, T, V = 4, 8, 16, 61
# The gradient of attention's key biases is 0 but for rounding. An eps far above that rounding and below every other
# gradient keeps AdamW from dividing it by itself.
LR, EPS, CLIP = 1e-2, 1e-6, 0.5
GROUPS: dict[str, list] = {}


def case(group: str):
    return lambda function: GROUPS.setdefault(group, []).append(function) or function


def build(**more) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 48, "n_head": 3, "vocab_size": V, "n_positions": T}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **more}, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))


def build_nanogpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=2, n_head=3, n_embd=48, dropout=0.0, bias=False))


def loss_of(model, ids):
    """Next-token loss of a row, as either interface has it."""
    inner = getattr(model, "module", model)
    if isinstance(getattr(inner, "_orig_mod", inner), GPT):
        return model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())[1]
    return model(ids, labels=ids).loss


def optimizer_of(model, **more) -> AdamW:
    options = {"lr": LR, "eps": EPS, "weight_decay": 0.1, "clip_grad_norm": CLIP, **more}
    return AdamW(model.parameters(), **options)


def batches() -> torch.Tensor:
    return torch.randint(V, (STEPS, B, T), generator=torch.Generator().manual_seed(1))


def mine(batch: torch.Tensor) -> torch.Tensor:
    """The rows of this rank."""
    rows = len(batch) // dist.get_world_size()
    return batch[dist.get_rank() * rows :][:rows]


def mean(loss: torch.Tensor) -> float:
    loss = loss.detach().float().clone()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().float()


def farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (whole(a) - whole(b)).abs().max().item() if a.numel() else 0.0


def train(model, optimizer, *, parts=1, rows=mine, quiet=nullcontext):
    """(losses, gradient norms) of STEPS steps; parts: micro-batches a rank, `quiet` around all but the last."""
    losses, norms = [], []
    for batch in batches():
        optimizer.zero_grad()
        total = 0.0
        for i, ids in enumerate(rows(batch).chunk(parts)):
            with quiet() if i < parts - 1 else nullcontext():
                loss = loss_of(model, ids) / parts
                loss.backward()
            total += mean(loss) if rows is mine else loss.item()
        optimizer.step()
        losses.append(total)
        norms.append(optimizer.last_grad_norm.item())
    return losses, norms


@functools.lru_cache
def alone(make=build, dtype=torch.float32):
    """(losses, norms, weights, optimizer, weights before) of one process and the whole batch."""
    model = make()
    begin = [whole(p).clone() for p in model.parameters()]
    optimizer = optimizer_of(model)
    if dtype != torch.float32:
        optimizer.cast(model, dtype)
    losses, norms = train(model, optimizer, rows=lambda batch: batch)
    return losses, norms, [whole(p) for p in model.parameters()], optimizer, begin


def apart(losses, norms, weights, expected) -> dict[str, float]:
    """The largest relative differences of losses and norms, the largest of a weight, and how far all weights together
    are from where one process has them, as a share of the way that they went (2-norms)."""
    relative = lambda a, b: max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
    flat = lambda tensors: torch.cat([t.flatten() for t in tensors])
    ours, theirs, begin = map(flat, (weights, expected[2], expected[4]))
    return {
        "loss": relative(losses, expected[0]), "norm": relative(norms, expected[1]),
        "weight": farthest(ours, theirs), "way": ((ours - theirs).norm() / (theirs - begin).norm()).item(),
    }  # fmt: skip


def run(model, make=build, expected=None, optimizer=None, **how) -> dict[str, float]:
    optimizer = optimizer or optimizer_of(model)
    losses, norms = train(model, optimizer, **how)
    return apart(losses, norms, [whole(p) for p in model.parameters()], expected or alone(make))


def sharded(model, by="block", **options):
    mesh = options.pop("mesh", None) or init_device_mesh("cpu", (2,))
    if by == "block":
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def is_tied(model) -> None:
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p is model.lm_head.weight for p in model.parameters()) == 1


# --- the user's own loop


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


def refuses(output, words: str) -> None:
    with pytest.raises(RuntimeError, match=words) as raised:
        output.logits  # noqa: B018
    assert "\n" not in str(raised.value)


# --- AdamW on DTensors


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
    folder = Path(sys.argv[2]) / "dcp"
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


# --- a patched transformers model under accelerate and Trainer


def build_hf():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=48, n_head=3, vocab_size=V, n_positions=T, embd_pdrop=0.0,
                                     attn_pdrop=0.0, resid_pdrop=0.0, use_cache=False)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Texts(torch.utils.data.Dataset):
    """STEPS batches of B texts of unequal lengths; the labels leave the padding out."""

    def __init__(self):
        self.ids = batches().flatten(0, 1)
        self.lengths = torch.randint(4, T + 1, (len(self.ids),), generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        mask = (torch.arange(T) < self.lengths[i]).long()
        return {"input_ids": self.ids[i], "attention_mask": mask, "labels": self.ids[i].masked_fill(mask == 0, -100)}


@functools.lru_cache
def alone_hf(counts_first: bool = False):
    """As `alone`: transformers' own model and torch's optimizer, one process, and logits of the first rows after it.

    counts_first: divide the loss by all labels as Trainer does, the first of each text among them, which is not scored.
    """
    model = build_hf()
    begin = [whole(p).clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=0.0)
    losses, norms = [], []
    for batch in torch.utils.data.DataLoader(Texts(), batch_size=B):
        optimizer.zero_grad()
        count = (batch["labels"] != -100).sum() if counts_first else None
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    batch = next(iter(torch.utils.data.DataLoader(Texts(), batch_size=B)))
    with torch.no_grad():
        logits = model.eval()(**batch).logits[batch["attention_mask"].bool()]
    return losses, norms, [whole(p) for p in model.parameters()], logits, begin


def _fsdp_plugin():
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["GPT2Block"],
        reshard_after_forward=True, cpu_ram_efficient_loading=False,
    )  # fmt: skip


def _shard_on_the_cpu(plugin) -> None:
    """accelerate shards on GPUs alone and takes DDP on a CPU, plugin or not; nothing in its FSDP2 needs a GPU."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _accelerate(plugin=None, optimizer_class=torch.optim.AdamW, **options):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    import gpt2_fast

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    if plugin is not None:
        _shard_on_the_cpu(plugin)
    model = gpt2_fast.patch(build_hf())
    assert all(row.runs != "transformers" for row in swap.explain(model))
    optimizer = optimizer_class(model.parameters(), lr=LR, eps=EPS, weight_decay=0.0, **options)
    loader = torch.utils.data.DataLoader(Texts(), batch_size=B // 2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert isinstance(model, DDP if plugin is None else FSDPModule)
    losses, norms = [], []
    for batch in loader:
        optimizer.zero_grad()
        scored = (batch["labels"][:, 1:] != -100).sum()
        everyone = accelerator.reduce(scored.clone())
        # Gradients are averaged over the ranks; divided by all labels, they are to be summed.
        loss = model(**batch, num_items_in_batch=everyone).loss * accelerator.num_processes
        accelerator.backward(loss)
        losses.append(mean(loss))
        if "clip_grad_norm" not in options:
            norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
            norms.append(whole(norm).item())
        optimizer.step()
        if "clip_grad_norm" in options:
            norms.append(optimizer.optimizer.last_grad_norm.item())
    expected = alone_hf()
    found = apart(losses, norms, [whole(p) for p in model.parameters()], expected)
    batch = next(iter(torch.utils.data.DataLoader(Texts(), batch_size=B)))
    model.eval()
    with torch.no_grad():
        found["logits"] = farthest(model(**batch).logits[batch["attention_mask"].bool()], expected[3])
    inner = accelerator.unwrap_model(model)
    assert inner.lm_head.weight is inner.transformer.wte.weight
    return found


@case("accelerate")
def accelerate_ddp():
    return _accelerate()


@case("accelerate")
def accelerate_ddp_with_our_optimizer():
    return _accelerate(None, AdamW, clip_grad_norm=CLIP)


@case("accelerate")
def accelerate_fsdp():
    return _accelerate(_fsdp_plugin())


@case("accelerate")
def accelerate_fsdp_with_our_optimizer():
    return _accelerate(_fsdp_plugin(), AdamW, clip_grad_norm=CLIP)


@case("accelerate")
def patched_fsdp():
    """`fully_shard` by hand: the head is read by the fused loss within forward, and never when it is sharded."""
    import gpt2_fast

    model = sharded(gpt2_fast.patch(build_hf()), reshard_after_forward=True)
    with pytest.raises(ValueError, match="call gpt2_fast.patch before fully_shard"):
        gpt2_fast.patch(model)
    optimizer = optimizer_of(model, weight_decay=0.0)
    losses, norms, expected = [], [], alone_hf()
    for batch in torch.utils.data.DataLoader(Texts(), batch_size=B):
        optimizer.zero_grad()
        count = (batch["labels"][:, 1:] != -100).sum()
        output = model(**{name: mine(t) for name, t in batch.items()}, num_items_in_batch=count)
        refuses(output, "the head is sharded again")
        loss = output.loss * 2  # a rank's labels over all: FSDP2 averages, and they are to be summed
        loss.backward()
        optimizer.step()
        losses.append(mean(loss))
        norms.append(optimizer.last_grad_norm.item())
    found = apart(losses, norms, [whole(p) for p in model.parameters()], expected)
    batch = next(iter(torch.utils.data.DataLoader(Texts(), batch_size=B)))
    with torch.no_grad():
        found["logits"] = farthest(model(**batch).logits[batch["attention_mask"].bool()], expected[3])
    return found


def _trainer(**options):
    import transformers
    from accelerate.state import AcceleratorState, GradientState

    import gpt2_fast

    AcceleratorState._reset_state(True)
    GradientState._reset_state()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if options.get("fsdp"):
                _shard_on_the_cpu(_fsdp_plugin())
                self.is_fsdp_enabled = True

    arguments = transformers.TrainingArguments(
        output_dir=sys.argv[2], per_device_train_batch_size=B // 2, per_device_eval_batch_size=B // 2, max_steps=STEPS,
        learning_rate=LR, adam_epsilon=EPS, weight_decay=0.0, max_grad_norm=CLIP, lr_scheduler_type="constant",
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, ddp_backend="gloo",
        **options,
    )  # fmt: skip
    model = gpt2_fast.patch(build_hf())
    trainer = InOrder(model=model, args=arguments, train_dataset=Texts())
    trainer.train()
    assert isinstance(trainer.model_wrapped, FSDPModule if "fsdp" in options else DDP)
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    losses, norms = ([float(entry[name]) for entry in history] for name in ("loss", "grad_norm"))
    expected = alone_hf(counts_first=True)
    found = apart(losses, norms, [whole(p) for p in trainer.model_wrapped.parameters()], expected)
    texts = torch.utils.data.Subset(Texts(), range(B))
    predictions = torch.tensor(trainer.predict(texts).predictions)
    mask = torch.stack([text["attention_mask"] for text in texts]).bool()
    found["logits"] = farthest(predictions[mask], expected[3])
    return found


@case("trainer")
def trainer_ddp():
    return _trainer()


@case("trainer")
def trainer_ddp_recompute():
    return _trainer(gradient_checkpointing=True)


@case("trainer")
def trainer_fsdp():
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"], "reshard_after_forward": True}
    return _trainer(fsdp=True, fsdp_config=config)


# --- torch.compile, of one layer for its time

build_one_layer = functools.partial(build, n_layer=1)


@case("compile")
def compiled_inside_ddp():
    return run(DDP(torch.compile(build_one_layer(), backend="aot_eager")), make=build_one_layer)


@case("compile")
def compiled_around_ddp():
    return run(torch.compile(DDP(build_one_layer()), backend="aot_eager"), make=build_one_layer)


@case("compile")
def compiled_nanogpt_in_ddp():
    """As nanoGPT's train.py does: first compiled, then wrapped."""
    return run(DDP(torch.compile(build_nanogpt(), backend="aot_eager")), make=build_nanogpt)


@case("compile")
def compiled_blocks_in_fsdp():
    model = build_one_layer()
    for block in model.transformer.h:
        block.compile(backend="aot_eager")
    return run(sharded(model), make=build_one_layer)


def main(group: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found, wanted = {}, sys.argv[3:]
    for function in GROUPS[group]:
        if wanted and function.__name__ not in wanted:
            continue
        started = time.perf_counter()
        try:
            found[function.__name__] = function()
        except BaseException:
            found[function.__name__] = traceback.format_exc()
        finally:
            if os.environ.get("VERBOSE") and dist.get_rank() == 0:
                print(function.__name__, f"{time.perf_counter() - started:.1f} s", found[function.__name__], flush=True)
            (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # what torch's threads do as an interpreter ends is not under test


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
