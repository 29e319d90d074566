"""torch.set_default_dtype is about tensors that a program makes: a float32 model computes the same bits under any."""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import assert_same_bits
from test_model import pair, tokens

from gpt2_fast import AdamW
from gpt2_fast.generate import generate
from gpt2_fast.ops.adamw import adamw, samples
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy
from gpt2_fast.parallel.group import Group

WEIGHTS = ["float32", "bfloat16", "int8", "int4"]


@pytest.fixture(autouse=True)
def ordinary_default_afterwards():
    yield
    torch.set_default_dtype(torch.float32)


def losses(impl):
    """Loss and gradients with every option."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 32, generator=generator, dtype=torch.float32, device="cpu") for n in (5, 19))
    labels, found = torch.tensor([0, 18, 3, 2, -100], device="cpu"), []
    for options in (
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"num_items": 7},
        {"num_items": torch.tensor(7, device="cpu")},
    ):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        loss = linear_cross_entropy(*inputs, labels, impl=impl, **options)
        loss.backward(torch.ones_like(loss))
        found += [loss.detach(), *(t.grad for t in inputs)]
    return found


def steps(model):
    """Three, clipped, of a scaled loss too; in float32, and of bfloat16 weights with masters."""
    found, ids = [], tokens(2, 9).cpu()
    for dtype in (torch.float32, torch.bfloat16):
        trained = copy.deepcopy(model).to(dtype)
        optimizer = AdamW(trained.parameters(), lr=1e-2, clip_grad_norm=0.5)
        for scale in (None, torch.tensor(8.0, dtype=torch.float32, device="cpu"), None):
            loss = trained(ids, labels=ids).loss
            loss.backward()
            optimizer.step(grad_scale=scale)
            found += [loss.detach(), optimizer.last_grad_norm]
        found += [p.detach() for p in trained.parameters()]
    return found


def shared_steps(model):
    """After `shard`, whose buffers are made once."""
    found, ids = [], tokens(2, 9).cpu()
    for dtype in (torch.float32, torch.bfloat16):
        trained = copy.deepcopy(model).to(dtype)
        optimizer = AdamW(trained.parameters(), lr=1e-2, clip_grad_norm=0.5)
        optimizer.shard(Group(), 2)
        for row in (ids[:1], ids[1:]):
            trained(row, labels=row).loss.backward()
            optimizer.accumulate()
        optimizer.step()
        found += [optimizer.last_grad_norm, *(p.detach() for p in trained.parameters())]
    return found


def texts(model):
    """Token by token and several at once, greedy and drawn, by weights in every packed form and by the model."""
    prompts, found = [tokens(1, n, seed=n)[0].tolist() for n in (5, 9)], []
    for weights in (*WEIGHTS, None):
        for options in (
            {"temperature": 0},
            {"seed": 3, "top_k": 20},
            {"seed": 3, "top_p": 0.8, "on_token": lambda token: None},
        ):
            model.train(weights is None)  # then it is called, not packed
            found.append(torch.tensor(generate(model, prompts, 6, weights=weights, **options), device="cpu"))
    return found


def references():
    """The plain PyTorch step, of tensors made by the ordinary default."""
    default, found = torch.get_default_dtype(), []
    torch.set_default_dtype(torch.float32)
    made = list(samples())
    torch.set_default_dtype(default)
    for *lists, hyper, options in made:
        norm = adamw(*lists, hyper, **options, impl="reference")
        found += [*lists[0], *lists[2], *lists[3], *([] if norm is None else [norm])]
    return found


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_a_float32_model_computes_the_same_under_any_default(default):
    model, found = pair()[1].cpu(), []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        fresh = copy.deepcopy(model)  # packs anew
        found.append(
            [*losses("auto"), *losses("reference"), *steps(fresh), *shared_steps(fresh), *texts(fresh), *references()]
        )
    assert_same_bits(*found)
