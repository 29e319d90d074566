"""python -m tests.faults [--kills N] [--seed S]: runs that are faulted and resumed, and a table of what came of them.

The exit status is 0 where every run went on to the end with the bits of the one that nothing interrupted.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from .plans import Plan, suite
from .runs import LIBRARY, VARIABLES, build, prepare, run
from .trials import differs, finished, left_over, trial


def _again_with_injector(work: Path) -> None:
    """This command in a process that has the injector loaded; forks of it are the runs."""
    library = build(work)
    env = os.environ | VARIABLES | {"LD_PRELOAD": str(library), LIBRARY: str(library), "FAULT_WORK": str(work)}
    os.execve(sys.executable, [sys.executable, "-m", "tests.faults", *sys.argv[1:]], env)


def _report(tried: collections.Counter, failed: collections.Counter, events: list) -> None:
    kinds = collections.Counter(event.kind for event in events)
    print(f"a run makes {len(events)} calls: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))
    print(f"{'fault':<12}{'tried':>8}{'survived':>10}{'failed':>8}")
    for do in [*tried, "all"]:
        all_, bad = (tried[do], failed[do]) if do != "all" else (tried.total(), failed.total())
        print(f"{do:<12}{all_:>8}{all_ - bad:>10}{bad:>8}")


def faults(a: argparse.Namespace, work: Path) -> bool:
    """Runs the trials; whether all were survived."""
    arguments, root = prepare(work), work / "trial"
    started = time.monotonic()
    root.mkdir()
    straight = run(["train", *arguments, "--out", str(root / "run")], root)
    if straight.status or left_over(root):
        raise SystemExit(f"the run without a fault ended with status {straight.status}: {straight.text}")
    whole = finished(root / "run")
    if a.events:
        for event in straight.events:
            print(event.number, event.kind, event.path.replace(f"{root}/", ""))
        if a.kills is None:
            return True
    chosen = ([[Plan(**plan) for plan in json.loads(a.plans)]] if a.plans
              else suite(straight.events, straight.seconds, a.kills or 200, a.seed))  # fmt: skip
    tried, failed = collections.Counter(), collections.Counter()
    for plans in chosen:
        problem, _ = trial(arguments, root, plans, whole)
        tried[plans[0].do] += 1
        if problem:
            failed[plans[0].do] += 1
            text = json.dumps([plan.changed() for plan in plans])
            print(f"failed: {problem}\n    python -m tests.faults --plans '{text}'", flush=True)
    _report(tried, failed, straight.events)
    print(f"{time.monotonic() - started:.0f} s")
    assert differs(whole, whole) is None
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--kills", type=int, help="runs, 200 by default; every second one is killed, the others see errors"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plans", metavar="JSON", help="one run, as it was reported")
    parser.add_argument(
        "--events", action="store_true", help="list the calls of a run without a fault; with --kills before its runs"
    )
    a = parser.parse_args()
    if LIBRARY not in os.environ:
        memory = Path("/dev/shm")  # the suite is about what was called, not about how fast a disk is
        parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
        _again_with_injector(Path(tempfile.mkdtemp(prefix="gpt2_fast_faults_", dir=parent)))
    work = Path(os.environ["FAULT_WORK"])
    try:
        survived = faults(a, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    raise SystemExit(0 if survived else 1)


if __name__ == "__main__":
    main()
