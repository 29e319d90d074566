"""python -m tests.generated [--examples N] [--seed S] [--ops OP ...]: generated calls, and what came of them.

They are made in a child process that writes each down before it makes it. Where the child dies, the parent reports the
call, and another child goes on with the rest. The exit status is 0 where every call was right or clearly refused.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from . import OPS

TESTS = Path(__file__).resolve().parent.parent
CHILD = ["-m", "tests.generated", "--child"]
KINDS = {"right": "right", "refused": "refused in one clear line", "crash": "crashes", "unclear": "unclear errors",
         "wrong": "silently wrong"}  # fmt: skip
LIMIT_S = 120  # for one call


def _import() -> None:
    """What pytest does for tests."""
    sys.path.insert(0, str(TESTS))
    importlib.import_module("conftest")


def child(ops: list[str], examples: int, seed: int) -> None:
    """Makes `examples` calls and writes to stdout of each, a line: the call, and then its outcome."""
    _import()
    import hypothesis
    import torch

    from . import strategies

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategies.any_of(ops))
    def make(description):
        print(json.dumps(description), flush=True)
        signal.alarm(LIMIT_S)
        outcome = strategies.judge(description)
        signal.alarm(0)
        print(json.dumps(outcome), flush=True)

    make()


def parent(ops: list[str], examples: int, seed: int) -> bool:
    """Runs children until `examples` calls were made; whether all of them came out well."""
    counts: collections.Counter[str] = collections.Counter()
    faults: dict[str, list[str]] = collections.defaultdict(list)
    while counts["tried"] < examples:
        left = examples - counts["tried"]
        arguments = ["--examples", str(left), "--seed", str(seed), "--ops", *ops]
        process = subprocess.Popen(
            [sys.executable, *CHILD, *arguments], cwd=TESTS.parent, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},  # calls are short, and other processes want the processor
        )  # fmt: skip
        call, made = None, 0
        for line in process.stdout:
            if call is None:
                call = line.strip()
                continue
            kind, text = json.loads(line)
            counts.update(["tried", kind])
            made += 1
            if kind in ("unclear", "wrong"):
                faults[kind].append(f"{text}\n    {call}")
            call = None
        status = process.wait()
        if call is not None:
            counts.update(["tried", "crash"])
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            faults["crash"].append(f"{name}\n    {call}")
        elif status or not made:  # nothing more to draw, or it does not start
            if status:
                raise SystemExit(f"the child ended with status {status} between two calls")
            break
        seed += 1
    for kind, found in faults.items():
        for text in found:
            print(f"{kind}: {text}")
    print(f"tried {counts['tried']}: " + ", ".join(f"{counts[kind]} {words}" for kind, words in KINDS.items()))
    return not faults


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.generated", description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--call", help="makes one call, given as it is reported, here")
    a = parser.parse_args()
    if a.call:
        _import()
        from . import strategies

        print(*strategies.judge(json.loads(a.call)))
    elif a.child:
        child(a.ops, a.examples, a.seed)
    else:
        raise SystemExit(0 if parent(a.ops, a.examples, a.seed) else 1)


if __name__ == "__main__":
    main()
