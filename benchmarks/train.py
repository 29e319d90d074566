"""Tokens per second of the whole training step: forward, backward, clip and AdamW.

Each program runs in a process of its own; rounds alternate them, so a machine that drifts slows all alike, and
what is quoted is the ratio. All start from the same weights and see the same batches, and their losses stand
side by side: nobody wins by computing something else.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.programs import PROGRAMS, SIZES

RESULTS = Path(__file__).parent / "results"


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="gpt2", choices=SIZES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--device", default=None, choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each program")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each process that are not counted")
    parser.add_argument("--steps", type=int, default=6, help="counted steps of each process")
    parser.add_argument("--programs", nargs="+", metavar="NAME[:DTYPE]",
                        default=["gpt2_fast:float32", "gpt2_fast:bfloat16", "transformers:float32"],
                        help=f"of {', '.join(PROGRAMS)}; the last is what ratios are to")  # fmt: skip
    parser.add_argument("--out", default=str(RESULTS), help="folder for the JSON and the chart")
    return parser.parse_args(argv)


def _run(name: str, dtype: str, options: argparse.Namespace) -> dict:
    command = [sys.executable, "-m", "benchmarks.programs", "--name", name, "--dtype", dtype]
    for flag in ("size", "device", "batch", "context", "warmup", "steps"):
        command += [f"--{flag}", str(getattr(options, flag))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _summary(label: str, runs: list[dict], tokens: int) -> dict:
    rates = [tokens / s for run in runs for s in run["seconds"]]
    twentieths = statistics.quantiles(rates, n=5, method="inclusive")
    return {
        "program": label,
        "tokens_per_second": statistics.median(rates),
        "p20": twentieths[0],
        "p80": twentieths[-1],
        "rounds": [tokens / statistics.median(run["seconds"]) for run in runs],
        "first_step_seconds": statistics.median(run["first_step_seconds"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "losses": runs[0]["losses"],
    }


def machine(device: str) -> dict:
    """What every recorded figure carries: processor, versions, threads."""
    import torch

    from gpt2_fast.doctor import PACKAGES, cpu_name, version

    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("gpt2_fast", *PACKAGES)},
    }


def _print_table(rows: list[dict], base: dict) -> None:
    print(f"{'program':<40} {'tok/s':>8} {'p20':>8} {'p80':>8} {'ratio':>6} {'peak GB':>8} {'step 1 s':>9}  losses")
    for row in rows:
        pairs = [a / b for a, b in zip(row["rounds"], base["rounds"], strict=True)]
        row["ratio"] = statistics.median(pairs)
        shown = " ".join(f"{loss:.4f}" for loss in row["losses"][:5])
        print(
            f"{row['program']:<40} {row['tokens_per_second']:>8.0f} {row['p20']:>8.0f} {row['p80']:>8.0f} "
            f"{row['ratio']:>6.2f} {row['peak_bytes'] / 1e9:>8.2f} {row['first_step_seconds']:>9.2f}  {shown}"
        )


def _chart(rows: list[dict], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 * len(rows) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    names = [row["program"] for row in rows]
    bars = axes.barh(names, [row["tokens_per_second"] for row in rows],
                     color=["#d1495b" if n.startswith("gpt2_fast") else "#9aa5b1" for n in names])  # fmt: skip
    axes.bar_label(bars, [f" {row['tokens_per_second']:,.0f}  ({row['ratio']:.2f}x)" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("tokens per second, whole training step (median)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> int:
    """Runs the comparison, prints the table and writes JSON and PNG."""
    options = _arguments(argv)
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    programs = [tuple((p + ":float32").split(":")[:2]) for p in options.programs]
    unknown = [name for name, _ in programs if name not in PROGRAMS]
    if unknown:
        sys.exit(f"no program {unknown[0]!r}; choose of {', '.join(PROGRAMS)}")
    runs: dict[tuple[str, str], list[dict]] = {program: [] for program in programs}
    for round_index in range(options.rounds):
        for name, dtype in programs:
            runs[name, dtype].append(_run(name, dtype, options))
            rate = options.batch * options.context / statistics.median(runs[name, dtype][-1]["seconds"])
            print(f"round {round_index + 1}: {name} {dtype} {rate:.0f} tokens/s", file=sys.stderr, flush=True)
    tokens = options.batch * options.context
    rows = [_summary(f"{name} {dtype}", runs[name, dtype], tokens) for name, dtype in programs]
    _print_table(rows, rows[-1])
    host = machine(options.device)
    title = f"{options.size}, B = {options.batch}, T = {options.context}; {host['device']}, torch {torch.__version__}"
    stem = re.sub(r"[^A-Za-z0-9]+", "-", host["device"]).strip("-").lower()
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-train-{options.size}-b{options.batch}-t{options.context}-{time.strftime('%Y-%m-%d')}.json"
    given = [word for i, word in enumerate(argv) if "--out" not in (word, *argv[max(0, i - 1) : i])]
    record = {"command": " ".join(["python -m benchmarks train", *given]), "machine": host, "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    _chart(rows, title, path.with_suffix(".png"))
    print(f"{title}\n{path}")
    return 0
