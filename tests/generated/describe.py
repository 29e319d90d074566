"""Calls of the declared operations, drawn by hypothesis from their declarations as dicts of plain values.

{"op", "tensors": {name: description}, "options", "impl", "autocast", "grad": names, "upstream", "change", "valid"}.
A valid call must be right. What is not valid may be refused; where it is not, it must be right all the same.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from rooms import ROOMS, Room

from gpt2_fast.ops.attention import HEAD_MAX, HEAD_MIN
from gpt2_fast.ops.runtime.contract import FLOAT, SAME, STREAM, Input

from .build import CHANGES, FLOATS, LAYOUTS

Description = dict[str, Any]
BY_NAME = {room.name: room for room in ROOMS}

_seeds = st.integers(0, 1000)
_layouts = st.sampled_from(("contiguous", *LAYOUTS))
_often = st.sampled_from([True, True, True, False])
_seldom = st.sampled_from([False] * 5 + [True])
_few, _some, _many = st.integers(1, 5), st.integers(1, 40), st.integers(1, 130)
SIZES = {
    "B": st.integers(0, 4), "H": st.integers(1, 3), "T": st.one_of(_some, st.just(1), _many),
    "S": st.one_of(_some, _many),
    "D": st.one_of(st.sampled_from([16, 20, 64, 80]), st.integers(HEAD_MIN, HEAD_MAX), st.integers(1, 140)),
    "V": st.one_of(_some, st.integers(1, 600)), "P": _many,
}  # fmt: skip
INT32 = [-(2**31), -(2**31) + 1, -7, -1, 0, 1, 5, 30, 2**31 - 64, 2**31 - 1]
OUTSIDE = [-1, -100, -(2**31), -(2**63), 2**31, 2**40, 2**63 - 1, 600]
BOUND = {"input_ids": "V", "token_type_ids": "V", "position_ids": "P", "labels": "V"}


@st.composite
def _dropout(draw, valid: list[bool]) -> dict | None:
    if draw(st.booleans()):
        return None
    dropout = {"p": draw(st.sampled_from([0.0, 0.1, 0.5, 0.999])), "key": draw(st.integers(-(2**63), 2**63 - 1)),
               "site": draw(st.sampled_from([0, 3, 2**31 - 1, 2**32 - 1]))}  # fmt: skip
    if draw(_seldom):
        valid[0] = False
        dropout |= draw(st.sampled_from([
            {"p": 1.0}, {"p": -0.1}, {"p": float("nan")}, {"p": 2}, {"key": None}, {"key": "float"}, {"key": "two"},
            {"key": "meta"}, {"p": 1e-9}, {"site": -1}, {"site": 2**40}, {"p": None}, {"p": "half"}, {"site": None},
        ]))  # fmt: skip
    return dropout


# Of each option by its name what is valid and what is not; of another one what the samples have is valid.
OPTIONS: dict[str, tuple[list, list]] = {
    **dict.fromkeys(("eps", "ln_1_eps", "ln_2_eps"), ([1e-5, 1e-8, 0.1], [0.0, -1.0, float("nan"), None, "small"])),
    "n_head": ([1, 2, 3], [0, -1, None, 1.0]),
    "attn_pdrop": ([0.0, 0.0, 0.2], [1.0, -0.1, float("nan"), None, "half"]),
    "activation": (["gelu", "gelu_new", "gelu_pytorch_tanh"], ["relu", "", None, 1]),
    "scale": ([None, 0.3, 1.0], [0.0, -1.0, float("inf"), float("nan"), "auto"]),
    "ignore_index": ([-100, 0, 2**40, -1], [None, 0.5]),
    "reduction": (["mean", "sum", "none"], ["average", None]),
    "dtype": ([None, None, "float32"], ["bfloat16", "float16", "float64", "int64"]),
}


@st.composite
def _options(draw, room: Room, valid: list[bool]) -> dict:
    """The options of an operation, and whether they are valid."""
    options: dict[str, Any] = {}
    for name in room.options:
        if name == "dropout":
            options[name] = draw(_dropout(valid))
            continue
        of_samples = [call[name] for call in room.calls() if name in call]
        good, bad = OPTIONS.get(name, (of_samples, [None, "text"]))
        if draw(_seldom):
            valid[0] = False
            good = bad
        options[name] = draw(st.sampled_from(good))
    return options


def _dtype(draw, spec: Input, first: str, op: str) -> str:
    if spec.dtype is SAME or op == "mlp" or spec is BY_NAME[op].op.inputs[0]:
        return first
    if spec.dtype is STREAM:
        return draw(st.sampled_from([first, "float32"])) if first != "float64" else first
    if spec.dtype is FLOAT:
        return draw(st.sampled_from([first, first, "float32", "bfloat16"]))
    return str(draw(st.sampled_from(spec.dtype))).removeprefix("torch.")


def _integers(draw, spec: Input, sizes: dict[str, int], valid: list[bool]) -> Description:
    if bound := BOUND.get(spec.name):
        values: Description = {"low": 0, "high": sizes[bound]}
        if draw(_seldom):
            values["at"] = [draw(st.integers(0, 200)), draw(st.sampled_from(OUTSIDE))]
            valid[0] = False
        elif spec.name == "labels" and draw(st.booleans()):
            values["at"] = [draw(st.integers(0, 200)), -100]
            valid[0] = False  # unless that is what is ignored
        return values
    if spec.name == "segments":
        values = {"low": -draw(_few), "high": draw(_few)}
    else:
        values = {"low": draw(st.sampled_from([-2, 0])), "high": sizes.get("S", 9) + 2}
    if draw(st.booleans()):
        values["at"] = [draw(st.integers(0, 200)), draw(st.sampled_from(INT32))]
    return values


def _tensor(draw, spec: Input, room: Room, first: str, sizes: dict[str, int], leading: list[int], valid) -> Description:
    shape = [sizes[name] if not name.isdigit() else int(name) for name in spec.sizes]
    dtype = _dtype(draw, spec, first, room.name)
    made = {"shape": [*leading, *shape] if spec.leading else shape, "dtype": dtype, "layout": draw(_layouts),
            "seed": draw(_seeds)}  # fmt: skip
    if dtype.startswith("int"):
        made |= _integers(draw, spec, sizes, valid)
        if dtype == "int32" and "at" in made and not -(2**31) <= made["at"][1] < 2**31:
            made["at"][1] = -1
    else:
        fan_in = made["shape"][0] if made["shape"] and len(spec.sizes) == 2 and not spec.leading else 1
        made["scale"] = draw(st.sampled_from([1.0, 0.1, 3.0])) * max(fan_in, 1) ** -0.5
        made["center"] = 1.0 if spec.name in ("weight", "ln_weight") and len(spec.sizes) == 1 else 0.0
        if spec.shape == "":  # num_items
            made |= {"scale": 0.0, "center": float(draw(_some))}
    return made


@st.composite
def calls(draw, op: str) -> Description:
    """A call of the operation of this name."""
    room, valid = BY_NAME[op], [True]
    names = {name for i in room.op.inputs for name in i.sizes if not name.isdigit()}
    sizes = {name: draw(SIZES.get(name, st.one_of(_some, _many))) for name in sorted(names)}
    options: dict[str, Any] = {}
    if op == "embedding":
        sizes["P"] = max(sizes["P"], sizes["T"])
    if op == "block":  # whose heads share C among them
        sizes["D"], options["n_head"] = draw(SIZES["D"]), draw(st.integers(1, 3))
        sizes["C"] = options["n_head"] * sizes["D"]
        sizes["3C"] = 3 * sizes["C"]
    leading = draw(st.lists(st.one_of(_few, _few, st.integers(0, 1), _some), min_size=0, max_size=3))
    first = draw(st.sampled_from(FLOATS[:3] * 3 + FLOATS[3:]))
    tensors: dict[str, Description | None] = {}
    for spec in room.op.inputs:
        there = not spec.optional or draw(_often)
        tensors[spec.name] = _tensor(draw, spec, room, first, sizes, leading, valid) if there else None
    options = draw(_options(room, valid)) | (options if draw(_often) else {})
    if op == "linear_cross_entropy" and options["reduction"] != "mean" and tensors["num_items"]:
        valid[0] = False
    if op == "embedding" and tensors["position_ids"] and draw(st.booleans()):
        tensors["position_ids"]["shape"] = draw(st.sampled_from([[sizes["T"]], [1, sizes["T"]]]))
    if op == "embedding" and first != "float32" and options["dtype"] not in (None, "float32", first):
        valid[0] = False
    if op == "block":
        dropout, heads = options["dropout"], options["n_head"]
        valid[0] &= options["attn_pdrop"] == 0.0 or bool(dropout and dropout["p"])
        valid[0] &= isinstance(heads, int) and heads > 0 and sizes["C"] % heads == 0
        sizes["D"] = sizes["C"] // heads if valid[0] else sizes["D"]
    if tensors.get("residual", 1) is None and (options.get("dropout") or {}).get("p"):
        valid[0] = False
    if op == "mlp" and tensors["proj_weight"] is None:
        tensors["proj_bias"] = tensors["proj_bias"] if draw(_seldom) else None
        valid[0] &= tensors["proj_bias"] is None
    impls = [impl for impl in room.impls if impl != "triton"]  # whose interpreter takes seconds
    impl = draw(st.sampled_from(["auto", "auto", *impls, *impls, "reference"]))
    if draw(_seldom) and draw(_seldom):
        impl = draw(st.sampled_from(["aten", "cuda", "", None, "fast"]))
    valid[0] &= impl in ("auto", "reference", *room.impls) and not (first == "float64" and impl in room.impls)
    valid[0] &= impl in ("auto", "reference") or HEAD_MIN <= sizes.get("D", HEAD_MIN) <= HEAD_MAX
    given = [name for name, t in tensors.items() if t is not None]
    change = draw(st.tuples(st.sampled_from(given), st.sampled_from(CHANGES))) if draw(_seldom) else None
    derivable = [n for n in given if room.op.gradients and n in room.op.differentiable]
    autocast = draw(_seldom)
    valid[0] &= room.autocasts or not autocast
    return {
        "op": op, "tensors": tensors, "options": options, "impl": impl, "autocast": autocast,
        "grad": draw(st.one_of(st.just(derivable), st.lists(st.sampled_from(derivable), unique=True)))
        if derivable else [],
        "upstream": {"seed": draw(_seeds), "layout": draw(_layouts)},
        "change": change and list(change), "valid": valid[0] and change is None,
    }  # fmt: skip
