"""Scores: perplexity by strided windows, the loss of token data, log-likelihoods of continuations.

Everything is the loss of some tokens given those before them: rows of ids, of which the end is scored. Rows of
like length share a batch, padded on the right, where no causal query sees it. Only scored positions meet the head,
and its logits are never whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gpt2_fast.data import TokenDataset
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.modes import evaluating
from gpt2_fast.modules import check_not_sharded
from gpt2_fast.ops.linear_cross_entropy import chunk_rows
from gpt2_fast.parallel.group import Group

Ids = Sequence[int] | np.ndarray | Tensor

Measures = dict[str, float | int]


class Row(NamedTuple):
    """Token ids of which ids[first:] are scored, first at least 1."""

    ids: np.ndarray
    first: int


def perplexity(
    model: GPT2LMHeadModel,
    ids: Ids,
    *,
    stride: int | None = None,
    context: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = False,
) -> Measures:
    """Perplexity of one long sequence by windows of `context` tokens that begin every `stride` tokens.

    A window scores the tokens that no earlier one has; those before them are context alone. The value is that of
    transformers' "Perplexity of fixed-length models" (huggingface.co/docs/transformers/perplexity), which weights
    the mean loss of a window by its new tokens less one.

    Args:
        ids: int [n], n at least 2.
        stride: 2 .. context, half of it unless given; the smaller, the more context every token has, and the slower.
        context: 2 .. n_positions; n_positions unless given.
        batch_size: windows at a time.
        limit: at most so many windows, from the start.

    Returns:
        loss, perplexity (its exponential) and tokens (how many were scored).
    """
    context, stride = window_sizes(model, context, stride)
    ids = np.asarray(ids)
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"ids have shape {ids.shape}; perplexity needs one sequence of at least 2 tokens")
    rows, weights, end = [], [], 0
    for begin in range(0, len(ids), stride):
        before, end = end, min(begin + context, len(ids))
        rows.append(Row(ids[begin:end], max(before - begin, 1)))
        weights.append(end - before - 1)
        if end == len(ids) or len(rows) == limit:
            break
    total, tokens = 0.0, 0
    for i, losses, _ in _score(model, rows, batch_size, progress, "perplexity"):
        if len(losses):
            total += losses.double().mean().item() * weights[i]
            tokens += len(losses)
    loss = total / max(sum(weights), 1)
    return {"loss": loss, "perplexity": exp(loss), "tokens": tokens}


def dataset_loss(
    model: GPT2LMHeadModel,
    data: TokenDataset,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = False,
    between: Callable[[], None] | None = None,
    group: Group | None = None,
) -> Measures:
    """Mean loss a token over windows that do not overlap (`TokenDataset.windows`), each token but the first scored.

    Args:
        limit: at most so many windows, spread evenly.
        between: called after each batch, by every process of the group at once; what it raises ends the evaluation.
        group: the processes that share the batches and then have the same result, that of one process to the bit.

    The model is in eval mode meanwhile, for all threads: none of them may train it.

    Returns:
        loss, perplexity (its exponential) and tokens.
    """
    device, group = model.lm_head.weight.device, group or Group()
    count, tokens = data.n_windows if limit is None else min(limit, data.n_windows), 0
    batches = -(-count // batch_size)
    sums = torch.zeros(-(-batches // group.world), dtype=torch.float64, device=device)  # of this process's batches
    with evaluating(model), torch.no_grad(), _bar(count, progress, "loss") as bar:
        for i, (inputs, targets) in enumerate(data.windows(batch_size=batch_size, limit=limit)):
            if i % group.world == group.rank:
                loss = model(inputs.to(device), targets=targets.to(device)).loss
                sums[i // group.world] = loss.double() * targets.numel()
            tokens += targets.numel()
            bar.update(len(inputs))
            if between is not None and (i % group.world == group.world - 1 or i == batches - 1):
                between()
    total = 0.0  # one after the other, as the batches follow each other
    for part in group.gather(sums).view(group.world, -1).t().flatten()[:batches].tolist():
        total += part
    loss = total / tokens
    return {"loss": loss, "perplexity": exp(loss), "tokens": tokens}


def loglikelihoods(
    model: GPT2LMHeadModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 8,
    greedy: bool = False,
    progress: bool = False,
    name: str = "log-likelihoods",
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each continuation given its context, of pairs (context ids, continuation ids).

    A context that does not fit n_positions loses its beginning, and an empty one is the config's bos_token_id,
    which GPT-2 has as <|endoftext|>: both as in lm-evaluation-harness.

    Args:
        greedy: also say of each continuation whether it is the most likely token at every step.
        name, names: of the progress bar, and of each pair in an error.

    Returns:
        float64 [n], and bool [n] or None.
    """
    n_positions, rows = model.config.n_positions, []
    for i, (context, continuation) in enumerate(pairs):
        if not 1 <= len(continuation) <= n_positions:
            which = f"pair {i}" if names is None else names[i]
            raise ValueError(
                f"{which}: what is to be scored has {len(continuation)} tokens; this model takes 1 to {n_positions}"
            )
        ids = np.array([*(context or [model.config.bos_token_id]), *continuation], dtype=np.int64)[-n_positions - 1 :]
        rows.append(Row(ids, len(ids) - len(continuation)))
    sums = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    matches = torch.zeros(len(rows), dtype=torch.bool, device="cpu") if greedy else None
    for i, losses, hits in _score(model, rows, batch_size, progress, name, greedy):
        sums[i] = -losses.double().sum()
        if greedy:
            matches[i] = hits.all()
    return sums, matches


def _score(
    model: GPT2LMHeadModel, rows: Sequence[Row], batch_size: int, progress: bool, name: str, greedy: bool = False
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """For each row, longest first: its index, the float32 losses of its scored tokens and, if greedy, whether each
    is the most likely token. All on the CPU."""
    check_not_sharded(model, name)
    device, head = model.lm_head.weight.device, model.lm_head.weight
    ops = model.transformer.ops
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    with evaluating(model), torch.no_grad(), _bar(len(rows), progress, name) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs, targets = _pad([rows[i] for i in batch])
            scored = (targets >= 0).to(device)
            hidden = model.transformer(inputs.to(device))[scored]  # [n, C]
            labels = targets.to(device)[scored]
            losses = ops.linear_cross_entropy(hidden, head, labels, reduction="none")
            hits = None
            if greedy:
                size = chunk_rows(device.type, head.shape[0], head.element_size())
                best = [ops.linear(part, head.t()).argmax(-1) for part in hidden.split(size)]
                hits = torch.cat(best).eq(labels).cpu()
            losses, place = losses.cpu(), 0
            for i, count in zip(batch, scored.sum(1).tolist(), strict=True):
                part = slice(place, place + count)
                yield i, losses[part], None if hits is None else hits[part]
                place += count
            bar.update(len(batch))


def _pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """int64 [B, T] inputs and targets: a target is the next id where it is scored, else -100."""
    width = max(len(row.ids) for row in rows) - 1
    inputs = torch.zeros(len(rows), max(width, 1), dtype=torch.int64, device="cpu")
    targets = torch.full_like(inputs, -100)
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.ids.astype(np.int64))
        inputs[i, : len(ids) - 1] = ids[:-1]
        targets[i, row.first - 1 : len(ids) - 1] = ids[row.first :]
    return inputs, targets


def _bar(total: int, progress: bool, name: str) -> tqdm:
    return tqdm(total=total, desc=name, leave=False, disable=None if progress else True)


def window_sizes(model: GPT2LMHeadModel, context: int | None, stride: int | None) -> tuple[int, int]:
    """(context, stride), checked: n_positions and half the context unless given."""
    n_positions = model.config.n_positions
    context = n_positions if context is None else context
    if not 2 <= context <= n_positions:
        raise ValueError(f"context is {context}; the model takes 2 to its n_positions, {n_positions}")
    stride = max(context // 2, 2) if stride is None else stride
    if not 2 <= stride <= context:  # at 1, the documented weights are 0 for all windows but the first
        raise ValueError(f"stride is {stride}; it must be 2 to the context, {context}")
    return context, stride


def exp(loss: float) -> float:
    """exp, infinite where it is beyond a float."""
    return math.exp(loss) if loss < 709 else math.inf
