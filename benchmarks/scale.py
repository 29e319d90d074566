"""Tokens per second, bytes sent, time in communication and memory of one training step on 1, 2, 4 ... processes.

The step is the same for each count: its micro-batches are shared out, and its losses are held to the first count's to
the bit. Processes on a CPU share its cores, so the fewer there are, the more threads each has. Rounds alternate the
counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence

import torch

from benchmarks import measure, scale_paper
from benchmarks.programs import SIZES
from benchmarks.roofline import fill
from gpt2_fast.files import atomic_write
from gpt2_fast.report.machine import environment

DEFAULTS = {
    "cpu": {"batch_size": 1, "context": 256, "dtype": "float32", "grad_accum": 4, "warmup": 1, "steps": 2},
    "cuda": {"batch_size": 32, "context": 1024, "dtype": "bfloat16", "grad_accum": 8, "warmup": 5, "steps": 10},
}
# On a CPU whose products are a vendor's, other bits are no fault where processes have another number of threads.
OTHER_THREADS, DIFFERENT = "other bits: other threads", "DIFFERENT"
HEADER = (
    "processes", "tokens/s", "times one", "MB sent", "waiting", "sending", "peak GB", "AdamW GB", "losses",
)  # fmt: skip


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", default="gpt2", choices=list(SIZES))
    parser.add_argument("--processes", help="by comma (CPU 1,2,4; GPU 1,2,4 ... as many as there are)")
    parser.add_argument("--batch-size", type=int, help="sequences of a micro-batch (CPU 1, GPU 32)")
    parser.add_argument("--grad-accum", type=int, help="micro-batches of a step, over all processes (CPU 4, GPU 8)")
    parser.add_argument("--context", type=int, help="tokens of a sequence (CPU 256, GPU 1024)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(CPU float32, GPU bfloat16)")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--compile-graph", action="store_true", help="on a GPU: the step as CUDA graphs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each count of processes")
    parser.add_argument("--warmup", type=int, help="steps of each run that are not counted (CPU 1, GPU 5)")
    parser.add_argument("--steps", type=int, help="counted steps of each run (CPU 2, GPU 10)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a run may take")
    parser.add_argument("--document", action="store_true", help="write SCALE.md's tables again: records, and on paper")
    parser.add_argument("--show", metavar="FILE.json", help="a recorded run as Markdown; runs nothing")
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder for the JSON and the chart")
    given = parser.parse_args(argv)
    for name, value in DEFAULTS[given.device].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if min(given.rounds, given.steps, given.batch_size, given.grad_accum, given.context) < 1 or given.warmup < 0:
        parser.error("--rounds, --steps and sizes must be at least 1, and --warmup at least 0")
    return given


def _counts(options: argparse.Namespace) -> list[int]:
    """How many processes, in order. Exits with one line for what cannot run."""
    if options.processes is None:
        most = torch.cuda.device_count() if options.device == "cuda" else 4
        return [w for w in (1, 2, 4, 8) if w <= most and options.grad_accum % w == 0]
    words = options.processes.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        sys.exit(f"--processes is {options.processes!r}; give numbers above 0, by comma")
    for w in map(int, words):
        if w & (w - 1) or options.grad_accum % w:
            sys.exit(f"--processes has {w}; it must be a power of two that divides --grad-accum {options.grad_accum}")
    return sorted(set(map(int, words)))


def _run(options: argparse.Namespace, count: int) -> dict:
    """One run of `count` processes, which share the machine's cores."""
    named = ("model", "batch_size", "grad_accum", "context", "dtype", "device", "dropout", "warmup", "steps")
    worker = {name: getattr(options, name) for name in named} | {"compile_graph": options.compile_graph}
    threads = max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
    launcher = ("--standalone", f"--nproc-per-node={count}", "-m", "benchmarks.scale_worker")
    return measure.run_worker(
        "torch.distributed.run", worker, options.timeout, {"OMP_NUM_THREADS": str(threads)}, launcher
    )


def rows(record: dict) -> list[list[str]]:
    """The table of a record."""
    tokens, runs = record["tokens_per_step"], record["runs"]
    base = runs[min(runs, key=int)]
    found = []
    for count, results in runs.items():
        middle = lambda key, results=results: statistics.median(one[key] for one in results)
        rate = measure.spread([tokens / one["seconds"] for one in results])["median"]
        times = measure.ratio([1 / one["seconds"] for one in results], [1 / one["seconds"] for one in base])
        same = all(one["losses"] == base[0]["losses"] for one in results)
        share = lambda key: f"{middle(key) / middle('watched'):.1%}"  # noqa: B023 - used in this turn alone
        found.append([
            str(count), f"{rate:,.0f}", f"{times:.2f}", f"{middle('sent') / 1e6:,.1f}", share("waited"),
            share("sending"), f"{middle('peak_bytes') / 1e9:.2f}", f"{middle('state_bytes') / 1e9:.2f}",
            "the same bits" if same else OTHER_THREADS if record.get("threads_matter") else DIFFERENT,
        ])  # fmt: skip
    return found


def _chart(record: dict):
    """Tokens a second, and memory of a process."""
    table = rows(record)
    number = lambda text: float(text.replace(",", ""))
    panels = []
    for column, unit in ((1, "tokens/s"), (6, "peak GB of a process"), (7, "GB of AdamW's state in a process")):
        panels.append((unit, [(f"{row[0]} processes", number(row[column]), row[column], True) for row in table]))
    setting = record["setting"]
    title = (
        f"{setting['model']}, {setting['dtype']}, {setting['grad_accum']} micro-batches of {setting['batch_size']} x "
        f"{setting['context']} a step, {record['machine']['device']}"
    )
    return measure.bar_chart(title, *panels)


def measured() -> str:
    """The tables of all records, as Markdown."""
    found = []
    for path in sorted(measure.RESULTS.glob("*-scale-*.json")):
        record = measure.load_record(path)
        machine = record["machine"]
        found.append(
            f"{machine['device']}, {os.path.basename(path)}, torch {machine['versions']['torch']}: "
            f"`{record['command']}`\n\n{measure.markdown_table(HEADER, rows(record))}"
        )
    return "\n\n".join(found)


def main(argv: Sequence[str]) -> None:
    """See the module. Exits with 1 when losses differ or no count ran."""
    options = _arguments(argv)
    if options.document:
        text = fill(scale_paper.DOCUMENT.read_text(), {"measured": measured(), "paper": scale_paper.document()})
        with atomic_write(scale_paper.DOCUMENT) as temporary:
            temporary.write_text(text)
        print(scale_paper.DOCUMENT)
        return
    if options.show:
        print(measure.markdown_table(HEADER, rows(measure.load_record(options.show))))
        return
    counts = _counts(options)
    setting = {k: v for k, v in vars(options).items() if k not in ("out", "show", "document", "timeout")}
    parts = ("scale", options.model, f"b{options.batch_size}", f"t{options.context}", options.dtype)
    record = {
        "command": measure.command_line("scale", argv), "machine": measure.machine(options.device), "setting": setting,
        "tokens_per_step": options.grad_accum * options.batch_size * options.context, "runs": {},
        "threads_matter": "number of threads" in environment(torch.device(options.device)),
    }  # fmt: skip
    path = measure.record_path(options.out, record["machine"]["device"], *parts)
    run = lambda name, _: _run(options, int(name))
    note = lambda name, _, one: f"{record['tokens_per_step'] / one['seconds']:,.0f} tokens/s"
    failures: dict[str, str] = {}
    for results, failures in measure.alternate(map(str, counts), options.rounds, run, note):
        record["runs"], record["failures"] = {k: v for k, v in results.items() if v}, failures
        if record["runs"]:
            measure.save_record(path, record)
    if not record["runs"]:
        sys.exit(f"no count of processes ran: {'; '.join(failures.values())}")
    table = rows(record)
    measure.save_figure(_chart(record), path.with_suffix(".png"))
    print(f"{record['command']}\n\n{measure.text_table(HEADER, table)}\n\n{path}")
    if failures or any(row[-1] == DIFFERENT for row in table):
        sys.exit(1)
