"""Tokens per second of the whole training step: forward, backward, clip and AdamW; data on the device.

Each program runs in a process of its own; rounds alternate them, so a machine that drifts slows all alike, and
what is quoted is the ratio. All start from the same weights and see the same batch. Their losses are held to the
float32 reference's step by step: a program that computes something else gets no speed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence

import torch

from benchmarks import measure, train_report
from benchmarks.programs import PROGRAMS, SIZES
from gpt2_fast.report.machine import card_peak

DTYPES = ("float32", "bfloat16")
# A CUDA graph is captured in the fourth step, so five are not counted on a GPU.
DEFAULTS = {
    "cpu": {"batch_size": "4", "context": "256", "dtype": "float32,bfloat16", "warmup": 3, "steps": 5},
    "cuda": {"batch_size": "32", "context": "1024", "dtype": "bfloat16", "warmup": 5, "steps": 20},
}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__.splitlines()[0])
    many = "; several by comma"
    parser.add_argument("--model", default="gpt2", help=f"{', '.join(SIZES)}{many}")
    parser.add_argument("--batch-size", help=f"sequences a step (CPU 4, GPU 32){many}")
    parser.add_argument("--context", help=f"tokens a sequence (CPU 256, GPU 1024){many}")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}: peers by autocast (CPU both, GPU bfloat16){many}")
    parser.add_argument("--programs", help=f"of {', '.join(PROGRAMS)} (default: all that can run){many}")
    parser.add_argument("--compile-graph", default="both", choices=("on", "off", "both"),
                        help="gpt2_fast on a GPU with its step as one CUDA graph, without, or both")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each program")
    parser.add_argument("--warmup", type=int, help="steps of each process that are not counted (CPU 3, GPU 5)")
    parser.add_argument("--steps", type=int, help="counted steps of each process (CPU 5, GPU 20)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a process may take")
    parser.add_argument(
        "--show", metavar="FILE.json", help="print the table of a recorded run as Markdown; runs nothing"
    )
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder for the JSON and the chart")
    given = parser.parse_args(argv)
    for name, value in DEFAULTS[given.device].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if min(given.rounds, given.steps) < 1 or given.warmup < 0:
        parser.error("--rounds and --steps must be at least 1, and --warmup at least 0")
    return given


def _listed(flag: str, text: str, known: Sequence[str]) -> list[str]:
    for word in (words := text.split(",")):
        if word not in known:
            sys.exit(f"{flag} has {word!r}; choose of {', '.join(known)}")
    return words


def _numbers(flag: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        sys.exit(f"{flag} is {text!r}; give numbers above 0, by comma")
    return list(map(int, words))


def _select(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The programs to run, and why not, by name, for those of the list that cannot."""
    names = _listed("--programs", options.programs, list(PROGRAMS)) if options.programs else list(PROGRAMS)
    if options.device == "cuda" and options.compile_graph != "both":
        dropped = {"on": "gpt2_fast", "off": "gpt2_fast-graph"}[options.compile_graph]
        names = [name for name in names if name != dropped]
    reasons = {name: PROGRAMS[name].missing(options.device) for name in names}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    return [name for name in names if name not in skipped], skipped


def _label(name: str, dtype: str) -> str:
    """How a row is called: peers in bfloat16 are float32 models under autocast."""
    return f"{name} {'bf16 autocast' if train_report.numbers(name, dtype) == 'autocast' else dtype}"


def _rate(options: argparse.Namespace, result: dict) -> float:
    return options.batch_size * options.context / statistics.median(result["seconds"])


def _measure(
    options: argparse.Namespace, names: Sequence[str]
) -> Iterator[tuple[list[dict], dict[str, str], dict[str, dict]]]:
    """After every round: rows of one setting, why some failed, and by dtype the rate of a large product."""
    keys = {_label(name, dtype): (name, dtype) for dtype in options.dtypes for name in names}
    base = {key: getattr(options, key) for key in ("model", "device", "batch_size", "context", "warmup", "steps")}
    with tempfile.TemporaryDirectory() as cache:  # its own, so that the first round's first step compiles

        def run(label: str, index: int) -> dict:
            name, dtype = keys.get(label) or ("product-peak", label)
            worker = {**base, "name": name, "dtype": dtype, "count_launches": index == 0}
            return measure.run_worker(
                "benchmarks.programs", worker, options.timeout, {"TORCHINDUCTOR_CACHE_DIR": cache}
            )

        products: dict[str, dict] = {}  # of all rounds the fastest: one measurement is soon disturbed
        note = lambda label, index, result: f"{_rate(options, result):,.0f} tokens/s"
        for results, failures in measure.alternate(keys, options.rounds, run, note):
            for dtype in options.dtypes:
                found = (run(dtype, 0), *([products[dtype]] if dtype in products else []))
                products[dtype] = max(found, key=lambda product: product["flops_per_second"])
            yield [_row(options, label, *keys[label], runs) for label, runs in results.items()], failures, products


def _row(options: argparse.Namespace, label: str, name: str, dtype: str, runs: Sequence[dict]) -> dict:
    tokens = options.batch_size * options.context
    return {
        "program": label,
        "name": name,
        "dtype": dtype,
        "tokens_per_second": measure.spread([tokens / s for run in runs for s in run["seconds"]]),
        "rounds": [_rate(options, run) for run in runs],
        "first_step_seconds": runs[0]["first_step_seconds"],
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "launches": runs[0]["launches"],
        "losses": runs[0]["losses"],
    }


def _peaks(options: argparse.Namespace, device_name: str, measured: dict[str, dict]) -> dict[str, dict]:
    """By dtype, what MFU is a part of: the card's own peak, or the fastest large product of this run."""
    peaks = {}
    for dtype, product in measured.items():
        card = card_peak(device_name, dtype) if options.device == "cuda" else None
        what = f"a {product['edge']}-cube product in {dtype}, measured in this run"
        if card is None and options.device == "cpu" and dtype == "bfloat16":
            what = f"a {product['edge']}-cube product in bfloat16 or float32, the faster, measured in this run"
        rate = card or product["flops_per_second"]
        peaks[dtype] = {
            "flops_per_second": rate,
            "what": "the maker's data sheet" if card else what,
            "measured": product,
        }
    return peaks


def _record(options: argparse.Namespace, rows, failures, skipped, products, command: str) -> dict:
    host = measure.machine(options.device, "liger-kernel")
    keys = ("model", "batch_size", "context", "warmup", "steps")
    record = {
        "command": command,
        "machine": host,
        "setting": {**{key: getattr(options, key) for key in keys}, "rounds": max(len(row["rounds"]) for row in rows)},
        "memory_is": "torch's allocator, on the GPU" if options.device == "cuda" else "resident set of the process",
        "peaks": _peaks(options, host["device"], products),
        "skipped": skipped,
        "failed": failures,
        "rows": rows,
    }
    train_report.complete(record)
    return record


def _one(options: argparse.Namespace, names: list[str], skipped: dict[str, str], command: str) -> bool:
    """Measures one setting, writes its files after every round, and prints its table; whether all ran and agreed."""
    rows, failures = [], {}
    parts = ("train", options.model, f"b{options.batch_size}", f"t{options.context}")
    for rows, failures, products in _measure(options, names):
        if rows:
            record = _record(options, rows, failures, skipped, products, command)
            path = measure.record_path(options.out, record["machine"]["device"], *parts)
            measure.save_record(path, record)
            measure.save_figure(train_report.chart(record), path.with_suffix(".png"))
    for name, reason in {**skipped, **failures}.items():
        print(f"{'failed' if name in failures else 'skipped'}: {name}: {reason}")
    if not rows:
        return False
    print(f"{train_report.text(record)}\n{path}\n", flush=True)
    return not failures and all(row["losses_agree"] for row in rows)


def main(argv: list[str]) -> int:
    """Runs the comparison for every model, batch and context asked for. 1 if a program failed or computed otherwise."""
    options = _arguments(argv)
    if options.show:
        print(train_report.markdown(measure.load_record(options.show)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device is cuda and torch finds no CUDA device; use --device cpu, or see gpt2-fast doctor")
    options.dtypes = _listed("--dtype", options.dtype, DTYPES)
    models = _listed("--model", options.model, list(SIZES))
    batches, contexts = _numbers("--batch-size", options.batch_size), _numbers("--context", options.context)
    for model, context in itertools.product(models, contexts):
        if context > (limit := SIZES[model].get("n_positions", 1024)):
            sys.exit(f"--context has {context} and {model} has {limit} positions; lower it")
    names, skipped = _select(options)
    good = True
    for options.model, options.batch_size, options.context in itertools.product(models, batches, contexts):
        good &= _one(options, names, skipped, measure.command_line("train", argv))
    return 0 if good else 1
