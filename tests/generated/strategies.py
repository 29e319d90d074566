"""One strategy and one judge for all operations, those that are no declared ones included."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from . import adamw, decode_step, decode_tokens, describe, draw
from . import judge as declared
from .describe import Description
from .judge import Outcome

APART = {"adamw": adamw, "decode_step": decode_step, "decode_tokens": decode_tokens, "draw": draw}


def calls(op: str) -> st.SearchStrategy[Description]:
    """Calls of one operation."""
    return APART[op].calls() if op in APART else describe.calls(op)


def any_of(ops: Sequence[str]) -> st.SearchStrategy[Description]:
    """Calls of these operations, in turn by chance."""
    return st.one_of([calls(op) for op in ops])


def judge(description: Description) -> Outcome:
    """What comes of a described call."""
    return (APART.get(description["op"]) or declared).judge(description)
