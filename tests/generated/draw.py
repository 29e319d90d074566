"""`draw` with generated logits and options: described, made and judged as in `describe` and `judge`."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from gpt2_fast.ops.draw import draw

from . import build
from .describe import Description
from .judge import RIGHT, WRONG, Outcome, refused

INPUTS = ("logits", "uniform", "temperature", "top_k", "top_p", "impl")
SLACK = 1e-4  # of sums of probabilities: float32 logits, and ties in bfloat16 and float16
_seldom = st.sampled_from([False] * 4 + [True])


@st.composite
def calls(draw) -> Description:
    """Rows of logits; every fifth call with something wrong in it."""
    described = {
        "op": "draw", "B": draw(st.integers(1, 5)), "V": draw(st.sampled_from([1, 2, 15, 64, 65, 777, 4097])),
        "dtype": draw(st.sampled_from(["float32", "float32", "float32", *build.FLOATS])),
        "seed": draw(st.integers(0, 1000)), "scale": draw(st.sampled_from([0.0, 0.1, 3.0])),
        "layout": draw(st.sampled_from(build.LAYOUTS)),
        "temperature": draw(st.sampled_from([1.0, 0.7, 1e-3, 1e-45, 50.0])),
        "top_k": draw(st.sampled_from([None, 1, 2, 20, 700, 10**6])),
        "top_p": draw(st.sampled_from([None, 1.0, 0.9, 0.3, 1e-9])),
        "greedy": draw(_seldom), "impl": draw(st.sampled_from(["auto", "cpp", "reference"])), "change": None,
    }  # fmt: skip
    described["valid"] = described["impl"] != "cpp" or described["dtype"] == "float32"
    if draw(_seldom) and not described["greedy"]:
        change = draw(st.sampled_from([
            ["temperature", draw(st.sampled_from([0.0, -1.0, float("inf"), float("nan")]))],
            ["top_k", draw(st.integers(-3, 0))], ["top_p", draw(st.sampled_from([0.0, -0.1, 1.1, float("nan")]))],
            ["uniform", "float32"], ["uniform", "longer"], ["logits", "sparse"], ["logits", "integers"],
            ["logits", "1-D"],
        ]))  # fmt: skip
        described |= {"change": change, "valid": False}
    return described


def _made(d: Description) -> tuple[torch.Tensor, torch.Tensor | None, dict]:
    kind, how = d["change"] or (None, None)
    described = {name: d[name] for name in ("dtype", "layout", "seed", "scale")}
    logits = build.tensor({"shape": [d["B"], d["V"]], **described})
    if kind == "logits":
        logits = {"sparse": logits.to_sparse, "integers": logits.long, "1-D": logits.flatten}[how]()
    uniform = torch.rand(
        d["B"] + (how == "longer"), generator=torch.Generator().manual_seed(d["seed"]), dtype=torch.float64
    )
    uniform = uniform.float() if how == "float32" else uniform
    options = {name: how if kind == name else d[name] for name in ("temperature", "top_k", "top_p")}
    return logits, None if d["greedy"] else uniform, options


def judge(description: Description) -> Outcome:
    """What comes of a described call: each token has to be one that the definition in float64 allows."""
    logits, uniform, options = _made(description)
    try:
        tokens, highest = draw(logits, uniform, **options, impl=description["impl"])
    except Exception as error:
        return refused("draw", INPUTS, error, description["valid"])
    if not description["valid"]:
        return Outcome(WRONG, "was not refused")
    if not torch.equal(highest, logits.amax(-1).float()):
        return Outcome(WRONG, f"highest is {highest.tolist()}")
    for row, token in enumerate(tokens.tolist()):
        own = logits[row].double()
        if uniform is None:
            right = token == int((own == own.max()).nonzero()[0])
        else:
            right = 0 <= token < len(own) and _allowed(own, float(uniform[row]), token, **options)
        if not right:
            return Outcome(WRONG, f"row {row} draws {token}")
    return Outcome(RIGHT)


def _allowed(logits: torch.Tensor, at: float, token: int, temperature: float, top_k, top_p) -> bool:
    """Whether some set of kept tokens within SLACK of the definition has this token at this place."""
    below = logits - logits.max()
    p = torch.where(below == 0, 1.0, (below / temperature).exp())
    if top_k is not None and top_k < len(p):
        p = torch.where(logits >= logits.topk(top_k).values[-1], p, 0.0)
    ordered, order = (p / p.sum()).sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    for edge in (-SLACK, 0.0, SLACK):
        n = max(1, int((before < (top_p or 1.0) + edge).sum()))
        for first in range(max(0, n - 2), n):  # of equals at the end more or fewer
            kept = torch.zeros_like(p).scatter(0, order[: first + 1], ordered[: first + 1])
            cumulated = (kept / kept.sum()).cumsum(0)
            if (
                kept[token] > 0
                and cumulated[token] - kept[token] / kept.sum() - SLACK <= at <= cumulated[token] + SLACK
            ):
                return True
    return False
