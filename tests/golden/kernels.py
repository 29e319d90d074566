"""The machine code of every shipped Triton configuration, kept in git: a file a Triton version, a line a configuration.

    python tests/golden/kernels.py                compares all of them with the file of the installed Triton
    python tests/golden/kernels.py --sample       compares the few of SAMPLE, which is what a test has time for
    python tests/golden/kernels.py --write        makes the file anew: half an hour of one core for 600 configurations

With --only STEM (repeatable) either looks at the configurations of kernels/STEM.py alone.

A refactor leaves every line as it is. A commit that changes a line says why. Needs no GPU; each Triton compiles with
the ptxas in its own wheel, so the file of another version is made where that one is installed.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
COLUMNS = ("name", "arch", "registers", "spilled_bytes", "shared_bytes", "mma", "waits", "sha256")

# The architectures that a version's file holds, where it does not hold all of kernels/cards.py.
HELD: dict[str, tuple[int | str, ...]] = {"3.6.0": (80, 90, 100), "3.8.0": (80, 90, 100), "3.9.0": (80, 90, 100)}

# Of every kernel one configuration, the architectures in turn: what a test has time for.
SAMPLE = (
    ("adamw update aligned clip", 90),
    ("adamw norm_partial unaligned", 80),
    ("add_layernorm forward C=768 bf16 h=fp32 dropout", 80),
    ("add_layernorm backward C=768 bf16 h=bf16 dropout", 90),
    ("add_layernorm normalize C=1600 fp32 h=fp32 no residual", 100),
    ("attention.forward bf16 D=64", 90),
    ("attention.backward_dq bf16 D=64 dropout", 80),
    ("attention.backward_dkdv bf16 D=64", 90),
    ("attention_decode.split bf16 D=64", 100),
    ("attention_decode.combine fp32 D=80", 80),
    ("reduce_partials", 100),
    ("column_sum bf16", 90),
    ("gelu_backward bf16 erf", 80),
    ("mlp few rows bf16 h=bf16", 100),
    ("softmax_xent bf16 gradient", 90),
    ("linear_gelu.backward bf16", 90),
    ("mlp few rows fp16 h=fp16", 75),
    ("gelu_forward bf16", 86),
    ("column_sum bf16", 89),
    ("attention.forward bf16 D=64", 120),
    ("add_layernorm forward C=768 bf16 h=bf16 dropout", "gfx90a"),
    ("attention.forward bf16 D=64", "gfx942"),
)

Rows = dict[tuple[str, str], dict[str, str]]


def path(version: str) -> Path:
    """The file of one Triton version."""
    return FOLDER / f"kernels-{version}.csv"


def read(file: Path) -> Rows:
    """(name, arch) -> its line."""
    with file.open(newline="") as lines:
        return {(row["name"], row["arch"]): row for row in csv.DictReader(lines)}


def write(file: Path, rows: Rows) -> None:
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
    temporary.replace(file)


def line(name: str, arch: int | str, report: dict[str, Any]) -> dict[str, str]:
    """A report of `aot.inspect` as the file has it: all strings."""
    mma = " ".join(f"{opcode}:{count}" for opcode, count in sorted(report["mma"].items()))
    found = {**report, "name": name, "arch": arch, "mma": mma}
    return {column: str(found[column]) for column in COLUMNS}


def _label(name: str, arch: int | str) -> str:
    return f"{name} {arch if str(arch).startswith('gfx') else f'sm_{arch}'}"


def jobs(version: str) -> list:
    """What the file of one Triton version holds, as jobs of `shipped.jobs`."""
    from gpt2_fast.kernels import aot, shipped

    return shipped.jobs(HELD.get(version, aot.ARCHS))


def differences(expected: Rows, found: Rows, whole: bool) -> list[str]:
    """What `found` has otherwise than `expected`, a line each. whole: what is missing in `found` counts too."""
    lines = []
    for key, row in sorted(found.items()):
        label = _label(*key)
        if key not in expected:
            lines.append(f"{label}: not in the file")
            continue
        changed = [c for c in COLUMNS if row[c] != expected[key][c]]
        resources = [f"{c} {expected[key][c] or 'none'} -> {row[c] or 'none'}" for c in changed if c != "sha256"]
        if changed:
            lines.append(f"{label}: {', '.join(resources) or 'other instructions, all else equal'}")
    if whole:
        lines += [
            f"{_label(*key)}: in the file, but no longer shipped" for key in sorted(expected.keys() - found.keys())
        ]
    return lines


def compile_all(wanted: list, workers: int) -> Rows:
    """Compiles jobs of `shipped.jobs`. Exits with one line when one does not compile."""
    from gpt2_fast.kernels import shipped

    rows: Rows = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for name, arch, report, error in pool.map(shipped.report, wanted, chunksize=1):
            if report is None:
                raise SystemExit(f"{_label(name, arch)} does not compile: {error}")
            rows[name, str(arch)] = line(name, arch, report)
    return rows


def sample(version: str) -> list:
    """The jobs of SAMPLE that a version's file holds. Exits with one line when one of them is no longer shipped."""
    from gpt2_fast.kernels import shipped

    by_name = {(shipped.spec(job).name, job.arch): job for job in shipped.jobs()}
    if gone := [key for key in SAMPLE if key not in by_name]:
        raise SystemExit(f"SAMPLE in {Path(__file__).name} names what is not shipped: {gone[0]}")
    held = set(jobs(version))
    return [by_name[key] for key in SAMPLE if by_name[key] in held]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make the file of the installed Triton anew")
    parser.add_argument("--sample", action="store_true", help="compile a few configurations only")
    parser.add_argument("--only", action="append", metavar="STEM", help="a file of kernels/ (may be repeated)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args(arguments)
    if options.sample and (options.write or options.only):
        parser.error("--sample is a comparison of its own: leave out --write and --only")
    os.environ.pop("TRITON_INTERPRET", None)  # under the interpreter there is nothing to compile
    import triton
    from gpt2_fast.kernels import shipped

    file, began = path(triton.__version__), time.monotonic()
    if not options.write and not file.exists():
        there = ", ".join(sorted(p.stem.removeprefix("kernels-") for p in FOLDER.glob("kernels-*.csv"))) or "none"
        print(
            f"{file.name} is missing: no golden machine code for the installed Triton {triton.__version__} "
            f"(there is: {there}); at a commit whose kernels are right run: python tests/golden/kernels.py --write"
        )
        return 2
    if unknown := set(options.only or ()) - set(shipped.stems()):
        parser.error(f"no file of kernels in kernels/: {', '.join(sorted(unknown))}")
    every = jobs(triton.__version__)
    only = [job for job in every if job.stem in (options.only or [job.stem])]
    found = compile_all(sample(triton.__version__) if options.sample else only, options.workers)
    seconds = f"{len(found)} configurations, triton {triton.__version__}, {time.monotonic() - began:.0f} s"
    if options.write:
        names = {(shipped.spec(job).name, str(job.arch)) for job in every}
        kept = {key: row for key, row in read(file).items() if key in names} if options.only and file.exists() else {}
        write(file, {**kept, **found})
        print(f"{file.name} written: {seconds}")
        return 0
    lines = differences(read(file), found, whole=not (options.sample or options.only))
    print("\n".join([*lines, f"{len(lines)} differ from {file.name}: {seconds}"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
