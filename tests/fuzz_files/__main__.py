"""python -m tests.fuzz_files [--files N] [--seed S] [--formats NAME ...]: damaged files, and what came of reading them.

They are read in a child process that writes each down before it reads it. Where the child dies, the parent reports the
file, and another child goes on with the rest. The exit status is 0 where every file was read right, read as another
file that no checksum tells from it, or refused in one line that names it.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CHILD = ["-m", "tests.fuzz_files", "--child"]
KINDS = ("right", "refused", "other", "wrong", "unclear", "crash")
LIMIT_S = 20  # for one file


def child(names: list[str], first: int, files: int, seed: int) -> None:
    """Reads files `first` to `files` and writes to stdout of each, a line: the file, and then what came of it."""
    from . import judge

    read = judge.Judge()
    for name in names:  # what is imported late is imported before memory is short
        read(name, 0)
    judge.limit_memory()
    for i in range(first, files):
        name = names[i % len(names)]
        print(json.dumps([name, seed + i]), flush=True)
        signal.alarm(LIMIT_S)
        outcome = read(name, seed + i)
        signal.alarm(0)
        print(json.dumps([outcome[0], outcome[1] if outcome[0] in ("wrong", "unclear") else ""]), flush=True)


def parent(names: list[str], files: int, seed: int) -> bool:
    """Runs children until `files` were read; whether all came out well."""
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in names}
    faults: dict[tuple[str, str, str], list[int]] = collections.defaultdict(list)
    done = 0
    while done < files:
        arguments = ["--first", str(done), "--files", str(files), "--seed", str(seed), "--formats", *names]
        process = subprocess.Popen(
            [sys.executable, *CHILD, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        file, before = None, done
        for line in process.stdout:
            if file is None:
                file = json.loads(line)
                continue
            kind, text = json.loads(line)
            counts[file[0]][kind] += 1
            if text:
                faults[kind, file[0], text[:30]].append((file[1], text))
            file, done = None, done + 1
        status = process.wait()
        if file is not None:
            counts[file[0]]["crash"] += 1
            died = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            faults["crash", file[0], died].append((file[1], died))
            done += 1
        elif done == before:
            raise SystemExit(f"the child ended with status {status} between two files")
    for (kind, name, _), found in faults.items():
        at, text = found[0]
        print(f"{kind} ({len(found)} times): {text}")
        print(f"    python -m tests.fuzz_files --formats {shlex.quote(name)} --one {at}")
    print(f"{'format':<28}" + "".join(f"{kind:>9}" for kind in KINDS))
    total = sum(counts.values(), collections.Counter())
    for name, count in [*counts.items(), ("all", total)]:
        print(f"{name:<28}" + "".join(f"{count[kind]:>9}" for kind in KINDS))
    return not faults


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_files", description=__doc__)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--formats", nargs="+", metavar="NAME", help="of the table; all without it")
    parser.add_argument("--one", type=int, metavar="N", help="reads one file, as it was reported, here")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    from .formats import FORMATS

    names = a.formats or list(FORMATS)
    if unknown := set(names) - FORMATS.keys():
        parser.error(f"no format is called {unknown.pop()!r}; there are {', '.join(map(repr, FORMATS))}")
    if a.one is not None:
        from .judge import Judge

        print(*Judge()(names[0], a.one))
    elif a.child:
        child(names, a.first, a.files, a.seed)
    else:
        raise SystemExit(0 if parent(names, a.files, a.seed) else 1)


if __name__ == "__main__":
    main()
