"""Two states of this package beside one another: whether anything became slower, and whether its results changed.

`python -m benchmarks compare OLD [NEW]`: each is a commit, which is unpacked and built in build/compare/, or a folder
that is built already; NEW is the checkout as it stands unless something else is named. For every case both run in turn,
each in processes of its own by the benchmark of its own state, on the same weights and batches.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks import measure
from benchmarks.programs import SIZES

BUILDS = measure.ROOT / "build" / "compare"
SIDES = ("old", "new")
CASES = {
    **{f"train {dtype}": ("train", dtype) for dtype in ("float32", "bfloat16")},
    **{f"generate {dtype}": ("generate", dtype) for dtype in ("float32", "bfloat16", "int8")},
}
SMOKE = {"model": "smoke", "batch_size": 2, "context": 16, "warmup": 1, "steps": 2, "rounds": 1, "new": 6, "prefill": 8}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("old", metavar="OLD", help="a commit, or a folder with a checkout that is built")
    add("new", metavar="NEW", nargs="?", default=".", help="the same (default: this checkout as it stands)")
    add("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}; several by comma (default: all)")
    add("--model", default="gpt2", choices=SIZES)
    add("--batch-size", type=int, default=4, help="sequences of a training step (default 4)")
    add("--context", type=int, default=256, help="tokens of each (default 256)")
    add("--warmup", type=int, default=2, help="steps of each process that are not counted (default 2)")
    add("--steps", type=int, default=4, help="counted steps of each process (default 4)")
    add("--new-tokens", dest="new_tokens", type=int, default=64, help="tokens that are generated (default 64)")
    add("--prefill", type=int, default=512, help="tokens of the prompt whose prefill is timed (default 512)")
    add("--batch-sizes", default="1", help="rows that are decoded together (default 1); several by comma")
    add("--rounds", type=int, default=4, help="processes of each side and case (default 4)")
    add("--tolerance", type=float, default=0.03, help="how much slower is called slower (default 0.03)")
    add("--timeout", type=float, default=900, help="seconds that a process may take")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--smoke", action="store_true", help="a size that only shows that everything runs")
    add("--out", default=str(measure.RESULTS), help="folder for the JSON")
    options = parser.parse_args(argv)
    for name, value in SMOKE.items() if options.smoke else ():
        setattr(options, "new_tokens" if name == "new" else name, value)
    options.cases = options.cases.split(",")
    for case in options.cases:
        if case not in CASES:
            parser.error(f"--cases has {case!r}; choose of {', '.join(CASES)}")
    if min(options.rounds, options.steps) < 1 or options.warmup < 0 or options.tolerance < 0:
        parser.error("--rounds and --steps must be at least 1, --warmup and --tolerance at least 0")
    return options


def checkout(name: str, build: Callable[[Path], None] | None = None) -> tuple[Path, str]:
    """The folder of one side, its extension built, and what it is called in the record.

    Args:
        name: a folder, or whatever `git rev-parse` takes for a commit.
        build: makes the extension in a folder that was just unpacked.

    Exits with one line: no such commit, or a folder that is not built.
    """
    if Path(name).is_dir():
        folder = Path(name).resolve()
        if not any((folder / "gpt2_fast").glob("_C*.so")):
            sys.exit(f"{name} has no built extension; run in it: python setup.py build_ext --inplace")
        return folder, _described(folder)
    found = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if found is None:
        sys.exit(f"{name} is neither a folder nor a commit of {measure.ROOT}")
    folder = BUILDS / found[:12]
    if not (folder / "built").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _unpack(found, folder)
        (build or _build)(folder)
        (folder / "built").touch()
    return folder, found[:12]


def own(folder: Path) -> dict[str, str]:
    """The environment in which Python finds this side's package before any that is installed or on PYTHONPATH."""
    return {"PYTHONPATH": str(folder)}


def check_own(folder: Path) -> None:
    """Exits with one line where `import gpt2_fast` is not of the folder: both sides would be one."""
    say = "import gpt2_fast, gpt2_fast.kernels as k; print(gpt2_fast.__file__, *k.__path__, sep='\\n')"
    command, env = [sys.executable, "-c", say], {**os.environ, **own(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    found = done.stdout.split("\n")[:-1]
    if done.returncode != 0 or not all(Path(path).is_relative_to(folder) for path in found):
        last = next(iter(reversed(found or done.stderr.strip().splitlines())), "nothing")
        sys.exit(f"gpt2_fast in {folder} is not what Python imports there: {last}")


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(measure.ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _described(folder: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else "a folder without git"


def _unpack(commit: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / "commit.tar"
        subprocess.run(["git", "-C", str(measure.ROOT), "archive", "-o", str(archive), commit], check=True)
        with tarfile.open(archive) as content:
            content.extractall(folder, filter="data")


def _build(folder: Path) -> None:
    environment = {**os.environ, "GPT2_FAST_REQUIRE_EXTENSION": "1", "PYTHONPATH": ""}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        sys.exit(f"{lines}\n{folder} did not build; its last lines are above")


def _figures(case: str, result: dict, options: argparse.Namespace) -> tuple[dict[str, float], object]:
    """What one process measured, by name in tokens/s, and what it computed."""
    if CASES[case][0] == "train":
        tokens = options.batch_size * options.context
        return {"": tokens / median(result["seconds"])}, result["losses"]
    speeds = {f", batch {size}": int(size) / median(result["steps"][size]) for size in options.batch_sizes.split(",")}
    speeds[f", prefill {options.prefill}"] = options.prefill / median(result["prefills"])
    return speeds, result["tokens"]


def _worker(case: str, options: argparse.Namespace, weights: str) -> tuple[str, dict]:
    kind, dtype = CASES[case]
    if kind == "train":
        shared = {key: getattr(options, key) for key in ("model", "device", "batch_size", "context", "warmup", "steps")}
        return "benchmarks.programs", {"name": "gpt2_fast", "dtype": dtype, **shared}
    return "benchmarks.generate_programs", {
        "name": "gpt2_fast", "dtype": dtype, "folder": weights, "device": options.device, "prompt": 16,
        "batch_sizes": options.batch_sizes, "new": options.new_tokens, "prefill": options.prefill, "prefills": 2,
        "seconds": 60,
    }  # fmt: skip


def outcome(old: object, new: object) -> str:
    """Whether losses or tokens are the same, and if not, how far apart or from where on."""
    if old == new:
        return "same"
    if isinstance(old, list):
        apart = max(abs(a - b) for a, b in zip(old, new, strict=True))
        return f"losses differ by up to {apart:.2g}"
    rows = [(a, b) for key in old for a, b in zip(old[key], new[key], strict=True) if a != b]
    at = min(next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
             for a, b in rows)  # fmt: skip
    return f"{len(rows)} rows of tokens differ, the first from token {at}"


def run_case(case: str, folders: dict[str, Path], options: argparse.Namespace, weights: str) -> list[dict]:
    """The rows of one case: for each figure old, new and their ratio in every round. Raises ProgramFailed."""
    module, worker = _worker(case, options, weights)
    run = lambda side, index: measure.run_worker(
        module, worker, options.timeout, own(folders[side]), root=folders[side]
    )
    note = lambda side, index, result: (
        f"{case}: {next(iter(_figures(case, result, options)[0].values())):,.1f} tokens/s"
    )
    for turn in measure.alternate(SIDES, options.rounds, run, note):
        results, failures = turn
        for side, reason in failures.items():
            raise measure.ProgramFailed(f"{side}: {reason}")
    sides = {side: [_figures(case, result, options) for result in found] for side, found in results.items()}
    said = outcome(sides["old"][0][1], sides["new"][0][1])
    rows = []
    for figure in sides["old"][0][0]:
        old, new = ([speeds[figure] for speeds, _ in sides[side]] for side in SIDES)
        ratios = [n / o for n, o in zip(new, old, strict=True)]
        rows.append({"case": case + figure, "old": old, "new": new, "ratios": ratios, "ratio": median(ratios),
                     "results": said})  # fmt: skip
    return rows


def table(rows: Sequence[dict], tolerance: float) -> str:
    """As text: the median of both sides, the median and the range of the rounds' ratios, and what it means."""
    body = [
        [row["case"], f"{median(row['old']):,.1f}", f"{median(row['new']):,.1f}",
         f"{row['ratio']:.3f} ({min(row['ratios']):.3f} to {max(row['ratios']):.3f})",
         "SLOWER" if row["ratio"] < 1 - tolerance else "", row["results"]]
        for row in rows
    ]  # fmt: skip
    return measure.text_table(["tokens/s", "old", "new", "new / old", "", "results"], body)


def main(argv: list[str]) -> int:
    """Runs the cases, prints the table and writes its record; 1 where something is slower or did not run."""
    options = _arguments(argv)
    (old, old_name), (new, new_name) = checkout(options.old), checkout(options.new)
    for folder in {old, new}:
        check_own(folder)
    rows, failed = [], {}
    with tempfile.TemporaryDirectory() as weights:
        if any(CASES[case][0] == "generate" for case in options.cases):
            prepare = {"prepare": "weights", "folder": weights, "model": options.model}
            measure.run_worker("benchmarks.generate_programs", prepare, options.timeout)
        for case in options.cases:
            try:
                rows += run_case(case, {"old": old, "new": new}, options, weights)
            except measure.ProgramFailed as error:
                failed[case] = str(error)
            path = _save(options, argv, {"old": old_name, "new": new_name}, rows, failed)
    for case, reason in failed.items():
        print(f"failed: {case}: {reason}")
    print(f"old: {old_name}, new: {new_name}; {options.rounds} rounds, the median of each process")
    print(table(rows, options.tolerance) if rows else "nothing was measured", path, sep="\n")
    return int(bool(failed) or any(row["ratio"] < 1 - options.tolerance for row in rows))


def _save(options: argparse.Namespace, argv: list[str], names: dict, rows: list[dict], failed: dict) -> Path:
    """Writes what was measured so far, so that a run that is cut off keeps its whole cases."""
    kept = (
        "model",
        "batch_size",
        "context",
        "warmup",
        "steps",
        "new_tokens",
        "prefill",
        "batch_sizes",
        "rounds",
        "tolerance",
    )
    record = {
        "command": measure.command_line("compare", [re.sub(r"^\.$", names["new"], word) for word in argv]),
        "machine": measure.machine(options.device), "setting": {key: getattr(options, key) for key in kept},
        **names, "rows": rows, "failed": failed,
    }  # fmt: skip
    path = measure.record_path(options.out, record["machine"]["device"], "compare", names["old"], names["new"])
    measure.save_record(path, record)
    return path
