"""What the benchmarks share: worker processes in alternating rounds, percentiles, tables, records and charts."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from gpt2_fast.files import atomic_write
from gpt2_fast.report.machine import PACKAGES, cpu_name, version

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS, PEER = "#d1495b", "#9aa5b1"


class ProgramFailed(RuntimeError):
    """A worker process ended without its line of JSON; the message is one line."""


def run_worker(
    module: str,
    options: Mapping[str, object],
    timeout: float,
    env: Mapping[str, str] | None = None,
    launched: Sequence[str] = (),
    root: Path = ROOT,
) -> dict:
    """Runs `python -m module --key value ...` from a checkout's root: the JSON of its last line on stdout.

    launched: what stands between a module that launches others and the options of these. An option that is True is
    passed as a flag alone; one that is False or None is left out.
    Raises ProgramFailed when it fails, prints no JSON, or takes more than `timeout` seconds.
    """
    command = [sys.executable, "-m", module, *launched]
    for key, value in options.items():
        if value is not None and value is not False:
            command += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=timeout,
                              env={**os.environ, **(env or {})})  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ProgramFailed(f"took more than {timeout:.0f} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it printed no result"]
    raise ProgramFailed(f"status {done.returncode}: {said[-1][:300]}")


def alternate(
    names: Iterable[str], rounds: int, run: Callable[[str, int], dict], note: Callable[[str, int, dict], str]
) -> Iterator[tuple[dict[str, list[dict]], dict[str, str]]]:
    """Runs every program once a round, in turn, so that a machine that drifts slows all alike.

    Args:
        run: (name, round from 0) -> what that process measured; a name for which it raises ProgramFailed is dropped.
        note: (name, round, result) -> the line that tells of it on stderr.

    Yields:
        After every round, so that a run that is cut off keeps its whole rounds: the results by name, one a round; and
        why, by name, of those that failed.
    """
    results: dict[str, list[dict]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    for index in range(rounds):
        for name in list(results):
            try:
                results[name].append(run(name, index))
                said = note(name, index, results[name][-1])
            except ProgramFailed as error:
                del results[name]
                failures[name] = said = str(error)
            print(f"round {index + 1} of {rounds}: {name}: {said}", file=sys.stderr, flush=True)
        yield results, failures


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0]}
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[-1]}


def ratio(rounds: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of value / base, each pair measured side by side."""
    return statistics.median(a / b for a, b in zip(rounds, base, strict=True))


def clock(device: str) -> float:
    """Seconds, when everything that was launched on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(device: str) -> int:
    """The most memory so far: what torch allocated on a GPU; on a CPU what the process held (resident)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: str, *packages: str) -> dict:
    """What every recorded figure carries: processor, threads, system and versions; `packages` besides the usual."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {package: version(package) for package in ("gpt2_fast", *PACKAGES, *packages)},
    }


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same rows for a README."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


PLACES = ("--out", "--folder", "--record")  # options that say where something lies, and nothing about a figure


def command_line(name: str, argv: Sequence[str]) -> str:
    """`python -m benchmarks name ...` as it was given, less PLACES and what follows them."""
    kept = [word for i, word in enumerate(argv) if word not in PLACES and (i == 0 or argv[i - 1] not in PLACES)]
    return " ".join(["python -m benchmarks", name, *kept])


def record_path(folder: str | Path, device: str, *parts: object) -> Path:
    """folder/<device>-<parts>-<date>.json."""
    words = "-".join(map(str, (device, *parts, time.strftime("%Y-%m-%d"))))
    return Path(folder) / (re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-").lower() + ".json")


def save_record(path: Path, record: Mapping[str, object]) -> None:
    """Writes JSON whole or not at all; makes the folder."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def load_record(path: str | Path) -> dict:
    """A record that was saved. Exits with one line when it cannot be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"{path} is no record of a benchmark: {error}")


def save_figure(figure, path: Path) -> None:
    """Writes a matplotlib Figure as PNG, whole or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


Bar = tuple[str, float, str, bool]  # label, value, what stands beside it, whether it is this package


def draw_bars(axes, unit: str, bars: Sequence[Bar]) -> None:
    """Horizontal bars, the first on top, on matplotlib Axes."""
    labels, values, notes, ours = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), values, color=[OURS if mine else PEER for mine in ours])
    axes.set_yticks(range(len(bars)), labels)
    axes.bar_label(drawn, notes, padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)


def bar_chart(title: str, *panels: tuple[str, Sequence[Bar]]):
    """A matplotlib Figure: for each (unit, bars) one panel, side by side; labels of the bars on the first alone."""
    from matplotlib.figure import Figure

    rows = max(len(bars) for _, bars in panels)
    figure = Figure(figsize=(4 + 4 * len(panels), 0.42 * rows + 1.3), layout="constrained")
    for i, (axes, (unit, bars)) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)
    ):
        draw_bars(axes, unit, bars)
        if i:
            axes.set_yticklabels([])
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure
