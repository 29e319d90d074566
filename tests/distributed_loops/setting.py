"""What all cases share: models, batches, one process's result, and how far two are from it."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gpt2_fast import AdamW, GPT2Config, GPT2LMHeadModel
from gpt2_fast.nanogpt import GPT, GPTConfig

STEPS, B, T, V = 4, 8, 16, 61
# The gradient of attention's key biases is 0 but for rounding. An eps far above that rounding and below every other
# gradient keeps AdamW from dividing it by itself.
LR, EPS, CLIP = 1e-2, 1e-6, 0.5
GROUPS: dict[str, list] = {}
folder = Path()  # of this run, for what a case writes


def case(group: str):
    return lambda function: GROUPS.setdefault(group, []).append(function) or function


def build(**more) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 48, "n_head": 3, "vocab_size": V, "n_positions": T}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **more}, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))


def build_nanogpt(n_layer: int = 2) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=n_layer, n_head=3, n_embd=48, dropout=0.0, bias=False))


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
