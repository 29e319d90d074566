"""adamw with its clip beside clip_grad_norm_ and torch.optim.AdamW(fused=True), over GPT-2's parameters.

torch has no float32 master weights: in bfloat16 its step moves fewer bytes and loses small updates.
"""

import torch

from benchmarks.ops.harness import Case, Size
from gpt2_fast.config import GPT2Config
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.ops.adamw import adamw, adamw_reference, cost
from gpt2_fast.ops.runtime.dispatch import LOW_PRECISION

DIRECTIONS = ("step",)
LIBRARY = "clip_grad_norm_, torch.optim.AdamW(fused)"
HYPER = (3e-4, 0.9, 0.95, 1e-8, 0.1, 0.0)
MAX_NORM = 1.0


def _shapes(size: Size) -> list[torch.Size]:
    sizes = {key: getattr(size, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    with torch.device("meta"):
        return [p.shape for p in GPT2LMHeadModel(GPT2Config(**sizes)).parameters()]


def _lists(shapes, dtype, device) -> tuple[list, ...]:
    """The lists that `adamw` takes before `hyper`."""
    weights = [torch.randn(s, device=device) for s in shapes]
    grads = [torch.randn(s, device=device).to(dtype) for s in shapes]
    averages, squares = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    masters = weights if dtype in LOW_PRECISION else []
    params = [w.to(dtype) for w in weights] if masters else weights
    steps = [torch.ones((), device=device) for _ in shapes]
    return params, grads, averages, squares, masters, steps, [0] * len(shapes)


def _library(params, grads) -> torch.optim.Optimizer:
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    lr, beta1, beta2, eps, decay, _ = HYPER
    return torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, fused=True)


def _check(dtype, device) -> None:
    """One step of `adamw` on small tensors against the reference in float64."""
    from numerics import assert_as_exact

    shapes, hyper = [(33, 96), (96,), (5,)], torch.tensor([HYPER], dtype=torch.float64, device=device)
    results = []
    for step in (adamw, adamw_reference, adamw_reference):
        torch.manual_seed(0)
        lists = _lists(shapes, dtype, device)
        if len(results) == 2:  # in float64 the weights are their own masters
            params, grads, averages, squares, masters, steps, groups = lists
            wide = ([t.double() for t in values] for values in (masters or params, grads, averages, squares))
            lists = (*wide, [], steps, groups)
        step(*lists, hyper, max_norm=MAX_NORM)
        results.append(lists[0] + lists[2] + lists[3])
    for actual, eager, truth in zip(*results, strict=True):
        assert_as_exact(actual, eager, truth, "params, exp_avgs, exp_avg_sqs", dtype)


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    shapes = _shapes(size)
    lists = _lists(shapes, dtype, device)
    hyper = torch.tensor([HYPER], dtype=torch.float64, device=device)
    copies = [p.clone() for p in lists[0]]  # torch's own parameters: its .grad would be our inputs'
    optimizer = _library(copies, lists[1])

    def library():
        torch.nn.utils.clip_grad_norm_(copies, MAX_NORM)
        optimizer.step()

    numel = sum(s.numel() for s in shapes)
    return Case(
        shape=f"{numel / 1e6:.1f}M parameters in {len(shapes)} tensors",
        inputs=(),
        programs={
            "gpt2_fast": lambda: adamw(*lists, hyper, max_norm=MAX_NORM),
            "library": library,
            "eager": lambda: adamw_reference(*lists, hyper, max_norm=MAX_NORM),
        },
        cost={"step": cost(numel, dtype.itemsize)["forward"]},
        check=lambda run: _check(dtype, device),
    )


def test_adamw(measure):
    measure(case)
