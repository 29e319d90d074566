"""`decode_tokens` with generated caches and options: described, made and judged as in `describe` and `judge`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor

from gpt2_fast.ops.decode_tokens import decode_tokens
from gpt2_fast.ops.draw import draw
from gpt2_fast.ops.packed_model import PackedCache, PackedModel

from . import build
from .decode_step import GROUPED, MODELS, POSITIONS, WEIGHTS, _packed
from .describe import Description
from .judge import RIGHT, WRONG, Outcome, refused

INPUTS = ("tokens", "token", "cache", "count", "uniforms", "temperature", "top_k", "top_p", "out", "logits")
_seldom = st.sampled_from([False] * 4 + [True])


@st.composite
def calls(draw) -> Description:
    """A prompt and a run of tokens after it; every fifth call with something wrong in it."""
    B, prompt, count = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 9))
    model = draw(st.integers(0, len(MODELS) - 1))
    V = MODELS[model]["vocab_size"]
    described = {
        "op": "decode_tokens", "model": model, "seed": draw(st.integers(0, 1000)),
        "weights": draw(st.sampled_from([*WEIGHTS, "int4"] if model in GROUPED else WEIGHTS)),
        "impl": draw(st.sampled_from(["auto", "cpp", "reference"])), "B": B, "prompt": prompt, "count": count,
        "room": prompt + count + draw(st.integers(0, 5)),
        "starts": draw(st.sampled_from([None, draw(st.lists(st.integers(0, prompt - 1), min_size=B, max_size=B))])),
        "layout": draw(st.sampled_from(build.LAYOUTS)), "greedy": draw(_seldom),
        "temperature": draw(st.sampled_from([1.0, 3.0, 0.7, 1e-3, 1e-45])),
        "top_k": draw(st.sampled_from([None, 1, 2, 20, 10**6])),
        "top_p": draw(st.sampled_from([None, 1.0, 0.9, 0.3, 1e-9])),
        "ends": draw(st.lists(st.one_of(st.integers(0, V - 1), st.sampled_from([-1, V, 10**6])), max_size=3)),
        "nan at": draw(st.sampled_from([None, None, draw(st.integers(0, POSITIONS - 1))])),
        "out": draw(st.booleans()), "change": None, "valid": True,
    }  # fmt: skip
    if draw(_seldom):
        change = draw(st.sampled_from([
            ["token", draw(st.sampled_from([-1, -(2**63), 2**63 - 1, 301, 10**6]))],
            ["count", draw(st.sampled_from([0, -1, 2.0, None, 41, 2**62]))],
            ["tokens", draw(st.sampled_from(build.CHANGES))], ["uniforms", draw(st.sampled_from(build.CHANGES))],
            ["uniform", draw(st.sampled_from([1.0, -1e-9, float("nan"), float("inf")]))],
            ["temperature", draw(st.sampled_from([0.0, -1.0, float("inf"), float("nan")]))],
            ["top_k", draw(st.integers(-3, 0))], ["top_p", draw(st.sampled_from([0.0, -0.1, 1.1, float("nan")]))],
            ["out", draw(st.sampled_from(build.CHANGES))],
            ["cache of another model", draw(st.integers(0, len(MODELS) - 1))],
        ]))  # fmt: skip
        described |= {"change": change, "valid": False}
    return described


@contextlib.contextmanager
def _spoiled(packed: PackedModel, position: int | None) -> Iterator[None]:
    """NaN in a row of wpe for as long as a call lasts."""
    if position is None:
        yield
        return
    held = packed.wpe[position].clone()
    packed.wpe[position] = torch.nan
    try:
        yield
    finally:
        packed.wpe[position] = held


def _filled(d: Description, owner: PackedModel, V: int) -> PackedCache:
    """A cache that holds the prompt."""
    starts = None if d["starts"] is None else torch.tensor(d["starts"], dtype=torch.int32)
    cache = PackedCache(owner, d["B"], d["room"], starts)
    values = {"seed": d["seed"], "low": 0, "high": V, "dtype": "int64", "layout": "contiguous"}
    owner.prefill(build.tensor({"shape": [d["B"], d["prompt"]], **values}), cache)
    return cache


def _arguments(d: Description) -> dict:
    """What `decode_tokens` is given beside the model and the cache."""
    (change, how), V, B = d["change"] or (None, None), MODELS[d["model"]]["vocab_size"], d["B"]
    newest = {"shape": [B], "seed": d["seed"] + 1, "low": 0, "high": V, "dtype": "int64", "layout": d["layout"]}
    tokens = build.tensor(newest | ({"at": [d["seed"], how]} if change == "token" else {}))
    generator = torch.Generator().manual_seed(d["seed"])
    uniforms = torch.rand(d["count"], B, generator=generator, dtype=torch.float64)
    if change == "uniform":
        uniforms.view(-1)[d["seed"] % uniforms.numel()] = how
    uniforms = None if d["greedy"] else build.laid_out(uniforms, d["layout"])
    given = {"tokens": tokens, "uniforms": uniforms, "out": torch.full((B, V), torch.nan) if d["out"] else None}
    given |= {name: d[name] for name in ("count", "temperature", "top_k", "top_p", "ends")}
    if change in ("tokens", "uniforms", "out"):
        given[change] = None if given[change] is None else build.changed(given[change], how)
    elif change in given:
        given[change] = how
    return given


def _in_turn(packed: PackedModel, cache: PackedCache, given: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, largest logits and the last logits of steps and draws."""
    options = {name: given[name] for name in ("temperature", "top_k", "top_p")}
    token, uniforms, found = given["tokens"], given["uniforms"], []
    for i in range(given["count"]):
        logits = packed.step(token, cache)
        token, high = draw(logits, None if uniforms is None else uniforms[i], **options, impl=packed.impl)
        found.append((token, high))
        if not high.isfinite().all() or any(t in given["ends"] for t in token.tolist()):
            break
    return *map(torch.stack, zip(*found, strict=True)), logits


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def judge(description: Description) -> Outcome:
    """What comes of a described call: to the bit what steps and draws in turn give, and the cache that they leave."""
    packed = _packed(description["model"], description["weights"], description["impl"])
    with _spoiled(packed, description["nan at"]):
        return _judge(description, packed)


def _judge(d: Description, packed: PackedModel) -> Outcome:
    (change, how), V, given = d["change"] or (None, None), packed.config.vocab_size, _arguments(d)
    owner = packed
    if change == "cache of another model":
        owner = _packed(how, "int8" if d["weights"] == "int4" and how not in GROUPED else d["weights"], d["impl"])
    cache, stepped = (_filled(d, owner, min(V, owner.config.vocab_size)) for _ in range(2))
    before = cache.length
    try:
        tokens, highest = decode_tokens(packed, cache=cache, **given)
    except Exception as error:
        if cache.length != before:
            return Outcome(WRONG, f"was refused when {cache.length - before} positions were added")
        return refused("decode_tokens", INPUTS, error, d["valid"])
    try:
        expected = _in_turn(packed, stepped, given)
    except Exception as error:
        return Outcome(WRONG, f"runs what a step or a draw refuses: {type(error).__name__}: {error}")
    told = expected[1].isfinite()  # where it is not, the token means nothing
    if tokens.dtype != torch.int64 or tokens.shape != told.shape or not torch.equal(tokens[told], expected[0][told]):
        return Outcome(WRONG, f"tokens are {tokens.tolist()}, in turn {expected[0].tolist()}")
    if not _same(highest, expected[1]):
        return Outcome(WRONG, f"highest is {highest.tolist()}, in turn {expected[1].tolist()}")
    if given["out"] is not None and not _same(given["out"], expected[2]):
        return Outcome(WRONG, "out is not the last logits")
    if cache.length != stepped.length:
        return Outcome(WRONG, f"the cache holds {cache.length} positions, in turn {stepped.length}")
    if told.all() and cache.length < cache.n_positions:
        further = [packed.step(tokens[-1], c) for c in (cache, stepped)]
        if not _same(*further):
            return Outcome(WRONG, "a further step gives other logits")
    return Outcome(RIGHT)
