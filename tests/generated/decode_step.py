"""Decoding with generated models, prompts and caches: described, made and judged as in `describe` and `judge`."""

from __future__ import annotations

import functools

import torch
from hypothesis import strategies as st

from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.generate.decoders import parameters_of
from gpt2_fast.ops.packed_model import PackedCache, PackedModel

from . import build
from .describe import Description
from .judge import RIGHT, WRONG, Outcome, differs, refused

MODELS = [
    {"n_layer": 1, "n_embd": 4, "n_head": 1, "vocab_size": 5, "n_inner": 3},
    {"n_layer": 2, "n_embd": 80, "n_head": 5, "vocab_size": 301, "scale_attn_by_inverse_layer_idx": True},
    {"n_layer": 1, "n_embd": 48, "n_head": 3, "vocab_size": 37, "tie_word_embeddings": False},
    {"n_layer": 1, "n_embd": 70, "n_head": 5, "n_inner": 33, "vocab_size": 37, "activation_function": "gelu"},
    {"n_layer": 2, "n_embd": 96, "n_head": 3, "n_inner": 160, "vocab_size": 45},
]
INPUTS = ("tokens", "token", "cache", "starts", "row", "packed", "weights", "model", "batch_size", "impl")
POSITIONS = 40
WEIGHTS = ["float32", "bfloat16", "int8"]
GROUPED = [4]  # models whose widths int4 takes
_seldom = st.sampled_from([False] * 4 + [True])


@st.composite
def calls(draw) -> Description:
    """A prompt and some steps after it; every fifth call with something wrong in it."""
    B, prompt, steps = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(0, 4))
    starts = draw(st.lists(st.integers(0, prompt - 1), min_size=B, max_size=B))
    model = draw(st.integers(0, len(MODELS) - 1))
    weights = draw(st.sampled_from([*WEIGHTS, "int4"] if model in GROUPED else WEIGHTS))
    described = {
        "op": "decode_step", "model": model, "seed": draw(st.integers(0, 1000)),
        "weights": weights, "impl": draw(st.sampled_from(["auto", "cpp"])),
        "B": B, "prompt": prompt, "steps": steps, "room": prompt + steps + draw(st.integers(0, 5)),
        "starts": draw(st.sampled_from([None, starts])), "layout": draw(st.sampled_from(build.LAYOUTS)),
        "change": None, "valid": True,
    }  # fmt: skip
    if draw(_seldom):
        change = draw(st.sampled_from([
            ["token", draw(st.sampled_from([-1, -(2**63), 2**63 - 1, 301, 10**6]))],
            ["room", draw(st.integers(-1, 60))], ["B", draw(st.integers(0, 6))],
            ["tokens", draw(st.sampled_from(build.CHANGES))],
            ["starts", draw(st.sampled_from(build.CHANGES))], ["starts of", draw(st.integers(-2, 50))],
            ["cache of another model", draw(st.integers(0, len(MODELS) - 1))], ["weights", "int3"],
            ["cache of other weights", draw(st.sampled_from(WEIGHTS))],
        ]))  # fmt: skip
        described |= {"change": change, "valid": False}
    return described


@functools.lru_cache(maxsize=16)
def _model(index: int) -> GPT2LMHeadModel:
    torch.manual_seed(index)
    model = GPT2LMHeadModel(GPT2Config(n_positions=POSITIONS, initializer_range=0.1, **MODELS[index]), impl="reference")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                p += 0.1 * torch.randn_like(p)
    return model.eval()


@functools.lru_cache(maxsize=64)
def _packed(index: int, weights: str, impl: str, dtype: torch.dtype = torch.float32) -> PackedModel:
    return PackedModel(parameters_of(_model(index)), weights, impl=impl, dtype=dtype)


def _run(description: Description, impl: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    d, (change, how) = description, description["change"] or (None, None)
    packed = _packed(d["model"], "int3" if change == "weights" else d["weights"], impl, dtype)
    owner = packed
    if change == "cache of another model":
        owner = _packed(how, "int8" if d["weights"] == "int4" and how not in GROUPED else d["weights"], impl, dtype)
    elif change == "cache of other weights":
        owner = _packed(d["model"], how, impl, dtype)
    starts = None if d["starts"] is None else torch.tensor(d["starts"], dtype=torch.int32)
    starts = build.changed(starts, how) if change == "starts" and starts is not None else starts
    if change == "starts of":
        starts = torch.full((d["B"],), how, dtype=torch.int32)
    batch, room = (how if change == name else d[name] for name in ("B", "room"))
    cache = PackedCache(owner, batch, room, starts)
    values = {"low": 0, "high": MODELS[d["model"]]["vocab_size"], "dtype": "int64", "layout": d["layout"]}
    if change == "token":
        values["at"] = [d["seed"], how]
    tokens = build.tensor({"shape": [d["B"], d["prompt"]], "seed": d["seed"], **values})
    tokens = build.changed(tokens, how) if change == "tokens" else tokens
    logits = [packed.prefill(tokens, cache)]
    for i in range(d["steps"]):
        logits.append(packed.step(build.tensor({"shape": [d["B"]], "seed": i, **values}), cache))
    return torch.stack(logits)


def judge(description: Description) -> Outcome:
    """What comes of a described prompt and its steps."""
    try:
        actual = _run(description, description["impl"])
    except Exception as error:
        return refused("decode_step", INPUTS, error, description["valid"])
    try:
        eager, truth = (_run(description, "reference", dtype) for dtype in (torch.float32, torch.float64))
    except Exception as error:
        return Outcome(WRONG, f"runs what the reference refuses: {type(error).__name__}: {error}")
    # Keys and values may round to a neighbour in bfloat16, and activations of int8 and int4 have 13 to 15 bits.
    dtype = torch.float32 if description["weights"] == "float32" else torch.float16
    problem = differs(actual, eager, truth, dtype)
    return Outcome(WRONG, f"logits: {problem}") if problem else Outcome(RIGHT)
