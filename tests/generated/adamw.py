"""AdamW with generated lists of parameters: described, made and judged as in `describe` and `judge`."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from gpt2_fast.ops.adamw import adamw, adamw_reference
from gpt2_fast.ops.runtime.dispatch import LOW_PRECISION

from . import build
from .describe import Description
from .judge import RIGHT, WRONG, Outcome, differs, refused

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters", "steps")
INPUTS = (*LISTS, *(name.removesuffix("s") for name in LISTS), "groups", "hyper", "norm", "max_norm", "impl")
_shapes = st.lists(st.sampled_from([0, 1, 2, 5, 7, 16, 33, 96, 130]), max_size=3)
_numbers = st.sampled_from([-1, 0, 1, 5, 1000])
_seldom = st.sampled_from([False] * 4 + [True])


@st.composite
def calls(draw) -> Description:
    """A step over up to five parameters; every fifth with something wrong in it."""
    params = draw(st.lists(st.fixed_dictionaries({
        "shape": _shapes, "dtype": st.sampled_from([*build.FLOATS[:3], "float32"]), "seed": st.integers(0, 1000),
        "layout": st.sampled_from(["contiguous", "contiguous", "offset"]), "grad": st.sampled_from(build.LAYOUTS),
        "step": st.integers(1, 1000), "group": st.integers(0, 1),
    }), max_size=5))  # fmt: skip
    description = {
        "op": "adamw", "params": params, "hyper": draw(st.sampled_from(["contiguous", "offset", "every other"])),
        "max_norm": draw(st.sampled_from([None, 0.0, 0.5, 1e9, float("inf")])),
        "norm": draw(st.sampled_from([None, 3.0])),
        "impl": draw(st.sampled_from(["auto", "cpp", "reference"])), "change": None, "valid": True,
    }  # fmt: skip
    if draw(_seldom):
        what, how = (
            draw(st.sampled_from([*LISTS, "hyper", "norm"])),
            draw(st.sampled_from([*build.CHANGES, *build.LAYOUTS])),
        )
        description |= {"change": [what, draw(st.integers(0, 4)), how], "valid": False}
    elif draw(_seldom):
        change = draw(st.sampled_from(["one less", "the same twice", "group", "max_norm"]))
        description |= {"change": [change, draw(st.sampled_from(LISTS)), draw(_numbers)], "valid": False}
    return description


def _lists(description: Description) -> tuple[dict[str, list], torch.Tensor, dict]:
    lists: dict[str, list] = {name: [] for name in LISTS} | {"groups": []}
    for p in description["params"]:
        one = {"shape": p["shape"], "seed": p["seed"], "layout": "contiguous"}
        param = build.tensor(one | {"dtype": p["dtype"], "layout": p["layout"]})
        lists["params"].append(param)
        lists["grads"].append(build.tensor(one | {"dtype": p["dtype"], "layout": p["grad"], "seed": p["seed"] + 1}))
        lists["exp_avgs"].append(build.tensor(one | {"dtype": "float32", "scale": 0.1}))
        lists["exp_avg_sqs"].append(build.tensor(one | {"dtype": "float32"}).abs())
        if param.dtype in LOW_PRECISION:
            lists["masters"].append(param.float())
        lists["steps"].append(torch.tensor(float(p["step"])))
        lists["groups"].append(p["group"])
    hyper = torch.tensor([[1e-2, 0.9, 0.95, 1e-8, 0.1, 0], [3e-3, 0.8, 0.999, 1e-6, 0, 1]], dtype=torch.float64)
    norm = description["norm"]
    options = {"max_norm": description["max_norm"], "norm": None if norm is None else torch.tensor(norm)}
    return lists, build.laid_out(hyper, description["hyper"]), options


def _altered(t, how: str):
    return build.changed(t, how) if how in build.CHANGES else build.laid_out(t, how)


def _make(description: Description):
    lists, hyper, options = _lists(description)
    what, which, how = description["change"] or (None, None, None)
    if what == "hyper":
        hyper = _altered(hyper, how)
    elif what == "norm" and options["norm"] is not None:
        options["norm"] = _altered(options["norm"], how)
    elif what in LISTS and which < len(lists[what]):
        lists[what][which] = _altered(lists[what][which], how)
    elif what == "one less":
        lists[which] = lists[which][:-1]
    elif what == "the same twice" and len(lists[which]) > 1:
        lists[which][1] = lists[which][0]
    elif what == "group" and lists["groups"]:
        lists["groups"][0] = how
    elif what == "max_norm":
        options["max_norm"] = [-1.0, float("nan"), "large"][how % 3]
    return lists, hyper, options


def _copies(lists: dict[str, list], wide: bool = False) -> dict[str, list]:
    """Fresh copies; `wide`: in float64, where the master of a parameter is the parameter."""
    copies = {n: [t.to(torch.float64 if wide and n != "steps" else t.dtype, copy=True) for t in ts]
              for n, ts in lists.items() if n != "groups"}  # fmt: skip
    if wide:
        masters = iter(copies["masters"])
        copies["params"] = [next(masters) if p.dtype in LOW_PRECISION else q
                            for p, q in zip(lists["params"], copies["params"], strict=True)]  # fmt: skip
        copies["masters"] = []
    return copies | {"groups": list(lists["groups"])}


def judge(description: Description) -> Outcome:
    """What comes of a described step."""
    lists, hyper, options = _make(description)
    try:
        before = {n: [None if t is None else t.clone() for t in ts] for n, ts in lists.items() if n != "groups"}
    except (AttributeError, RuntimeError):
        before = None
    try:
        norm = adamw(*lists.values(), hyper, **options, impl=description["impl"])
    except Exception as error:
        return refused("adamw", INPUTS, error, description["valid"])
    try:
        eager, true = _copies(before | {"groups": lists["groups"]}), _copies(before | {"groups": lists["groups"]}, True)
        eager_norm = adamw_reference(*eager.values(), hyper, **options)
        true_norm = adamw_reference(*true.values(), hyper, **options)
    except Exception as error:
        return Outcome(WRONG, f"runs what the reference refuses: {type(error).__name__}: {error}")
    pairs = [("norm", norm, eager_norm, true_norm)] if norm is not None else []
    masters = iter(zip(lists["masters"], eager["masters"], strict=True))
    for i, (p, e, t) in enumerate(zip(lists["params"], eager["params"], true["params"], strict=True)):
        if p.dtype in LOW_PRECISION:
            master, eager_master = next(masters)
            if not torch.equal(p, master.to(p.dtype)):
                return Outcome(WRONG, f"param {i} is not its master rounded")
            p, e = master, eager_master
        pairs.append((f"param {i}", p, e, t))
    for n in ("exp_avgs", "exp_avg_sqs"):
        pairs += [(f"{n} {i}", *ts) for i, ts in enumerate(zip(lists[n], eager[n], true[n], strict=True))]
    for label, a, e, t in pairs:
        if problem := differs(a.reshape(t.shape), e.reshape(t.shape).to(a.dtype), t, torch.float32):
            return Outcome(WRONG, f"{label}: {problem}")
    for i, (g, was) in enumerate(zip(lists["grads"], before["grads"], strict=True)):
        if not torch.equal(g, was):
            return Outcome(WRONG, f"grad {i} is written")
    return Outcome(RIGHT)
