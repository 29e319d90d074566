"""A few hundred generated calls, each right or clearly refused; `make fuzz` makes ten thousand."""

from __future__ import annotations

import json

import pytest
import torch
from generated import OPS, strategies
from generated import __main__ as command
from generated.judge import REFUSED, RIGHT, UNCLEAR, WRONG, differs, refused
from hypothesis import HealthCheck, given, settings

EXAMPLES = 32  # of each operation


@pytest.mark.parametrize("op", OPS)
def test_a_generated_call_is_right_or_clearly_refused(op):
    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategies.calls(op))
    def check(description):
        outcome = strategies.judge(description)
        assert outcome.kind in (RIGHT, REFUSED), f"{outcome.kind}: {outcome.text}\n{json.dumps(description)}"

    check()


def test_what_is_wrong_is_seen():
    truth = torch.randn(3, 5, dtype=torch.float64)
    eager = truth.float()
    assert differs(eager, eager, truth, torch.float32) is None
    for wrong in (eager * 1.001, eager.double(), eager[:2], eager.where(truth < 1.0, torch.nan), torch.zeros(3, 5)):
        assert differs(wrong, eager, truth, torch.float32)
    infinite = truth.clone()
    infinite[0] = torch.nan
    assert "finite where the reference is not" in differs(eager, infinite.float(), infinite, torch.float32)


def test_what_is_unclear_is_seen():
    named = ValueError("linear: x is (3,); it must be [..., I]")
    assert refused("linear", ["x"], named, False).kind == REFUSED
    assert refused("linear", ["x"], named, True).kind == UNCLEAR
    for error in (RuntimeError(str(named)), ValueError("x is (3,)"), ValueError(f"{named}\n"), KeyError("x"),
                  ValueError("linear: wrong"), ZeroDivisionError("linear: x")):  # fmt: skip
        assert refused("linear", ["x"], error, False).kind == UNCLEAR


def test_a_process_that_dies_is_reported_and_the_rest_is_made(monkeypatch, capfd, tmp_path):
    """The child dies at its third call: the parent names it, and another child makes those that are left."""
    first = tmp_path / "died"
    script = tmp_path / "child.py"
    script.write_text(f"""
import json, os, pathlib, signal, sys
for i in range(int(sys.argv[sys.argv.index("--examples") + 1])):
    print(json.dumps({{"op": "linear", "call": i}}), flush=True)
    if i == 2 and not pathlib.Path({str(first)!r}).exists():
        pathlib.Path({str(first)!r}).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    print(json.dumps(["{WRONG}" if i == 1 else "{RIGHT}", "a number"]), flush=True)
""")
    monkeypatch.setattr(command, "CHILD", [str(script)])
    assert not command.parent(["linear"], 6, 0)
    out = capfd.readouterr().out
    assert 'crash: SIGSEGV\n    {"op": "linear", "call": 2}' in out
    assert "tried 6: 3 right, 0 refused in one clear line, 1 crashes, 0 unclear errors, 2 silently wrong" in out
