"""The per-op table, JSON and chart of `pytest benchmarks`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.measure import OURS, PEER, machine, ratio, record_path, save_figure, save_record, spread
from benchmarks.ops import harness

COLORS = {"gpt2_fast": OURS, "library": "#30638e", "compile": "#edae49", "eager": PEER}


def new_row(op: str, shape: str, dtype: str, direction: str, cost: dict[str, int]) -> dict:
    """One op, dtype and direction; `add` collects into it and `finish` makes figures of it."""
    return {"op": op, "shape": shape, "dtype": dtype, "direction": direction, **cost, "programs": {}}


def add(row: dict, program: str, label: str, wrong: str, seconds: Sequence[float], floor: float) -> None:
    """The seconds of one turn of one program, and the least that they could be at the machine's rate of the moment.

    wrong: what the program's check found, or "".
    """
    entry = row["programs"].setdefault(program, {"label": label, "wrong": wrong, "turns": [], "floors": []})
    entry["turns"].append(list(seconds))
    entry["floors"].append(floor)


def finish(row: dict) -> dict:
    """Adds median, percentiles, rates and percent of the ceiling to every program, and gpt2_fast's speedups.

    A speedup is the median over turns of other / gpt2_fast. There is none where either failed its check.
    """
    for entry in row["programs"].values():
        turns = entry.pop("turns")
        entry["seconds"] = spread([s for turn in turns for s in turn])
        entry["turns"] = [spread(turn)["median"] for turn in turns]
        median = entry["seconds"]["median"]
        entry["gb_per_second"] = row["bytes"] / median / 1e9
        entry["tflop_per_second"] = row["flops"] / median / 1e12
        shares = [floor / turn for floor, turn in zip(entry["floors"], entry["turns"], strict=True)]
        entry["percent_of_ceiling"] = 100 * statistics.median(shares)
    row["floor_seconds"] = statistics.median(f for entry in row["programs"].values() for f in entry["floors"])
    ours = row["programs"].get("gpt2_fast")
    for name, entry in row["programs"].items():
        if ours and name != "gpt2_fast" and not ours["wrong"] and not entry["wrong"]:
            entry["gpt2_fast_speedup"] = ratio(entry["turns"], ours["turns"])
    return row


def record(rows: list[dict], size: str, device: str, arguments: Sequence[str]) -> dict:
    """What is written: command, machine, sizes, ceilings and rows."""
    kept = [w for i, w in enumerate(arguments) if "--results" not in (w, *arguments[max(0, i - 1) : i])]
    edge = harness.SIZES[size].product
    dtypes = (torch.float32, torch.bfloat16)
    return {
        "command": " ".join(["pytest", *(w.removeprefix(f"{Path.cwd()}/") for w in kept)]),
        "machine": machine(device),
        "size": {"name": size, **dataclasses.asdict(harness.SIZES[size])},
        "copy_gb_per_second": harness.copy_rate(1 << 30, device) / 1e9,
        "product_tflop_per_second": {
            str(dtype).removeprefix("torch."): harness.product_rate(edge, dtype, device) / 1e12 for dtype in dtypes
        },
        "rows": rows,
    }


def table(record: dict) -> Iterator[str]:
    """The lines of the table."""
    products = ", ".join(f"{name} {rate:.3g}" for name, rate in record["product_tflop_per_second"].items())
    yield (f"{record['machine']['device']}, {record['machine']['threads']} thread(s), torch "
           f"{record['machine']['versions']['torch']}; a copy of 1 GiB moves {record['copy_gb_per_second']:.1f} GB/s, "
           f"a product reaches (TFLOP/s) {products}")  # fmt: skip
    yield (f"{'op, direction':<37} {'program':<41} {'ms':>9} {'p20':>9} {'p80':>9} {'GB/s':>7} {'TFLOP/s':>8} "
           f"{'ceiling':>8}  gpt2_fast is")  # fmt: skip
    heading = ""
    for row in record["rows"]:
        if heading != (heading := f"{row['op']} {row['dtype']}: {row['shape']}"):
            yield heading
        direction = f"{row['direction']}, bound by {row['bound']}"
        for entry in row["programs"].values():
            speedup = entry.get("gpt2_fast_speedup")
            note = f"WRONG: {entry['wrong']}" if entry["wrong"] else f"{speedup:.2f}x" if speedup else ""
            ms = "".join(f" {entry['seconds'][key] * 1e3:>9.3f}" for key in ("median", "p20", "p80"))
            yield (
                f"  {direction:<35} {entry['label']:<41}{ms} {entry['gb_per_second']:>7.1f} "
                f"{entry['tflop_per_second']:>8.3f} {entry['percent_of_ceiling']:>7.0f}%  {note}"
            ).rstrip()


def write(record: dict, folder: Path) -> Path:
    """Writes <device>-ops-<size>-<date>.json and the chart beside it; returns the JSON's path."""
    size = record["size"]
    parts = ("smoke",) if size["name"] == "smoke" else ("gpt2", f"b{size['B']}", f"t{size['T']}")
    path = record_path(folder, record["machine"]["device"], "ops", *parts)
    save_record(path, record)
    save_figure(chart(record), path.with_suffix(".png"))
    return path


def chart(record: dict):
    """A matplotlib Figure: percent of the ceiling, a line for every op and direction, a mark for every program."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row["dtype"] for row in record["rows"]))
    lines = list(dict.fromkeys((row["op"], row["direction"]) for row in record["rows"]))
    figure = Figure(figsize=(5.5 * len(dtypes) + 2, 0.4 * len(lines) + 2), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        for row in (r for r in record["rows"] if r["dtype"] == dtype):
            y = lines.index((row["op"], row["direction"]))
            axes.axhline(y, color="#e6e6e6", zorder=0)
            for name in reversed([n for n in harness.PROGRAMS if n in row["programs"]]):
                entry = row["programs"][name]
                if not entry["wrong"]:
                    axes.scatter(entry["percent_of_ceiling"], y, s=60 if name == "gpt2_fast" else 36,
                                 color=COLORS[name], label=name, zorder=2)  # fmt: skip
        axes.axvline(100, color="black", linewidth=0.8)
        axes.set_xlim(left=0)
        axes.set_yticks(range(len(lines)), [f"{op}, {direction}" for op, direction in lines])
        axes.set_xlabel(f"{dtype}: percent of the ceiling measured in the same run")
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].invert_yaxis()
    handles = [axes.get_legend_handles_labels() for axes in panels]
    marks = {label: mark for pair in handles for mark, label in zip(*pair, strict=True)}
    figure.legend(marks.values(), marks.keys(), loc="outside upper right", ncols=len(marks), frameon=False)
    title = f"{record['machine']['device']}, torch {record['machine']['versions']['torch']}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure
