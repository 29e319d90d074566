"""Tokens per second of generation: prefill, and decoding by batch size, greedy, on random weights of a named size.

Each program runs in a process of its own; rounds alternate them, so a machine that drifts slows all alike, and what
is quoted is the ratio. All load the same weights, and the tokens of each are laid beside the reference's: they part at
a near tie, sooner the more a program rounds, but one whose rows do not even begin alike computes something else and
gets no speed. With 4 bits random weights keep too little of themselves for that: int4 and q4_0 are not held to it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks import measure
from benchmarks.generate_programs import PROGRAMS
from benchmarks.programs import SIZES

REFERENCE = "transformers float32"
SMOKE = {"model": "smoke", "batch_sizes": "1,3", "prompt": 4, "new": 8, "prefill": 16, "prefills": 2, "rounds": 1}
BEGINNING, ENOUGH = 4, 0.5  # a row begins alike when its first 4 tokens are; so must half of them
COARSE = ("int4", "q4_0")  # tests hold int4 to its own rounded weights, `benchmarks quantisation` measures the rounding
PACKAGES = ("ctranslate2", "llama_cpp_python", "gguf")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks generate", description=__doc__.splitlines()[0])
    add, many = parser.add_argument, "; several by comma"
    add("--model", default="gpt2", choices=SIZES)
    add("--batch-sizes", default="1,8,64", help=f"rows that are decoded together (default 1,8,64){many}")
    add("--prompt", type=int, default=16, help="tokens of each prompt (default 16)")
    add("--new", type=int, default=128, help="most new tokens (default 128)")
    add("--prefill", type=int, default=512, help="tokens of the one prompt whose prefill is timed (default 512)")
    add("--prefills", type=int, default=2, help="how often a process times it (default 2)")
    add("--seconds", type=float, default=2.5, help="a process decodes no longer at one batch size (default 2.5)")
    add("--programs", help=f"NAME or NAME:DTYPE of {', '.join(PROGRAMS)} (default: all that are installed){many}")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, default=2, help="processes of each program (default 2)")
    add("--timeout", type=float, default=600, help="seconds that a process may take")
    add("--smoke", action="store_true", help="a size that only shows that everything runs")
    add("--show", metavar="FILE.json", help="print the table of a recorded run as Markdown; runs nothing")
    add("--out", default=str(measure.RESULTS), help="folder for the JSON and the chart")
    options = parser.parse_args(argv)
    for name, value in SMOKE.items() if options.smoke else ():
        setattr(options, name, value)
    return options


def _select(options: argparse.Namespace) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Label -> (name, dtype) of what runs, and by name why the rest does not."""
    chosen, skipped = {}, {}
    for word in (options.programs or ",".join(PROGRAMS)).split(","):
        name, _, dtype = word.partition(":")
        if name not in PROGRAMS:
            sys.exit(f"--programs has {word!r}; choose of {', '.join(PROGRAMS)}")
        reason = PROGRAMS[name].missing(options.device)
        if reason:
            skipped[name] = reason
            continue
        dtypes = PROGRAMS[name].dtypes[options.device]
        if dtype and dtype not in dtypes:
            sys.exit(f"--programs has {word!r}; on {options.device} {name} has {', '.join(dtypes)}")
        chosen |= {f"{name} {d}": (name, d) for d in ([dtype] if dtype else dtypes)}
    return chosen, skipped


def _prepare(options: argparse.Namespace, chosen: dict[str, tuple[str, str]], folder: str, skipped: dict) -> None:
    """Writes the weights and what the peers load; a peer whose file cannot be written is dropped, with the reason."""
    run = lambda what: measure.run_worker(
        "benchmarks.generate_programs", {"prepare": what, "folder": folder, "model": options.model}, options.timeout
    )
    run("weights")
    needs = {label: name if name == "ctranslate2" else dtype for label, (name, dtype) in chosen.items()
             if name in ("ctranslate2", "llama.cpp")}  # fmt: skip
    for what in dict.fromkeys(needs.values()):
        try:
            if what != "ctranslate2" and importlib.util.find_spec("gguf") is None:
                raise measure.ProgramFailed("gguf is not installed")
            run(what)
        except measure.ProgramFailed as error:
            for label in [label for label, needed in needs.items() if needed == what]:
                del chosen[label]
                skipped[label] = f"its file could not be written: {error}"


def _sizes(options: argparse.Namespace) -> list[str]:
    return options.batch_sizes.split(",")


def _decode_rate(run: dict, size: str) -> float:
    return int(size) / median(run["steps"][size])


def _row(options: argparse.Namespace, label: str, runs: list[dict]) -> dict:
    decode = {}
    for size in _sizes(options):
        rates = [int(size) / seconds for run in runs for seconds in run["steps"][size]]
        decode[size] = {**measure.spread(rates), "rounds": [_decode_rate(run, size) for run in runs]}
    prefill = [options.prefill / seconds for run in runs for seconds in run["prefills"]]
    rounds = [options.prefill / median(run["prefills"]) for run in runs]
    return {
        "program": label,
        "decode": decode,
        "prefill": {**measure.spread(prefill), "rounds": rounds},
        "load_seconds": median(run["load_seconds"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "tokens": runs[0]["tokens"],
    }


def _same(tokens: dict[str, list[list[int]]], reference: dict[str, list[list[int]]]) -> dict[str, int]:
    """Over all rows: tokens before the first that differs from the reference's, of how many; rows that begin alike."""
    found = {"same_tokens": 0, "compared_tokens": 0, "same_beginnings": 0, "compared_rows": 0}
    for key, rows in reference.items():
        for ours, theirs in zip(tokens[key], rows, strict=True):
            n = min(len(ours), len(theirs))
            equal = next((i for i in range(n) if ours[i] != theirs[i]), n)
            found["same_tokens"] += equal
            found["compared_tokens"] += n
            found["same_beginnings"] += equal >= min(n, BEGINNING)
            found["compared_rows"] += 1
    return found


def _compare(rows: list[dict]) -> None:
    """Adds what stands beside the reference: ratios, tokens that are the same, and who is wrong."""
    exact = [row for row in rows if not row["program"].endswith(COARSE)] or rows
    base = next((row for row in rows if row["program"] == REFERENCE), exact[-1])
    for row in rows:
        row["base"] = base["program"]
        for size, decode in row["decode"].items():
            decode["ratio"] = measure.ratio(decode["rounds"], base["decode"][size]["rounds"])
        row["prefill"]["ratio"] = measure.ratio(row["prefill"]["rounds"], base["prefill"]["rounds"])
        row.update(_same(row["tokens"], base["tokens"]))
        coarse = row["program"].endswith(COARSE)
        row["wrong"] = not coarse and row["same_beginnings"] < ENOUGH * row["compared_rows"]
    for row in rows:
        del row["tokens"]


def _cells(record: dict) -> tuple[list[str], list[list[str]]]:
    setting = record["setting"]
    sizes = setting["batch_sizes"].split(",")
    header = ["program", *(f"batch {size}" for size in sizes), f"prefill {setting['prefill']}", "peak GB",
              "load s", "same tokens"]  # fmt: skip
    show = lambda m: f"{m['median']:,.0f} ({m['p20']:,.0f} to {m['p80']:,.0f}) {m['ratio']:.2f}x"
    rows = []
    for row in record["rows"]:
        speeds = [*(row["decode"][size] for size in sizes), row["prefill"]]
        cells = ["wrong tokens"] * len(speeds) if row["wrong"] else [show(m) for m in speeds]
        same = f"{row['same_tokens']} of {row['compared_tokens']}"
        rows.append([row["program"], *cells, f"{row['peak_bytes'] / 1e9:.2f}", f"{row['load_seconds']:.1f}", same])
    return header, rows


def _title(record: dict) -> str:
    setting, host = record["setting"], record["machine"]
    return (
        f"{setting['model']}, greedy, prompt of {setting['prompt']}, up to {setting['new']} new tokens; "
        f"tokens/s, median (20th to 80th percentile), ratio to {record['rows'][0]['base']}\n"
        f"{host['device']}, {host['threads']} threads, torch {host['versions']['torch']}"
    )


def _chart(record: dict):
    sizes = record["setting"]["batch_sizes"].split(",")
    rows = [row for row in record["rows"] if not row["wrong"]]
    bar = lambda row, m: (
        row["program"], m["median"], f"{m['median']:,.0f}  ({m['ratio']:.2f}x)", row["program"].startswith("gpt2_fast"),
    )  # fmt: skip
    panels = [(f"decoding, batch {size}: tokens/s", [bar(row, row["decode"][size]) for row in rows]) for size in sizes]
    panels.append((f"prefill of {record['setting']['prefill']}: tokens/s", [bar(row, row["prefill"]) for row in rows]))
    return measure.bar_chart(_title(record), *panels)


def main(argv: Sequence[str]) -> int:
    """Runs the comparison, prints the table and writes JSON and PNG; status 1 where tokens are wrong."""
    options = _arguments(argv)
    if options.show:
        print(measure.markdown_table(*_cells(measure.load_record(options.show))))
        return 0
    chosen, skipped = _select(options)
    base = {key: getattr(options, key) for key in
            ("device", "batch_sizes", "prompt", "new", "prefill", "prefills", "seconds")}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        _prepare(options, chosen, folder, skipped)

        def run(label: str, index: int) -> dict:
            name, dtype = chosen[label]
            worker = {**base, "folder": folder, "name": name, "dtype": dtype}
            return measure.run_worker("benchmarks.generate_programs", worker, options.timeout)

        note = lambda label, index, result: ", ".join(
            f"batch {size} {_decode_rate(result, size):,.0f} tokens/s" for size in _sizes(options)
        )
        results, failures = {}, {}
        for results, failures in measure.alternate(chosen, options.rounds, run, note):
            if results:
                path, record = _save(options, base, results, skipped | failures, measure.command_line("generate", argv))
    for name, reason in (skipped | failures).items():
        print(f"not measured: {name}: {reason}")
    if not results:
        sys.exit("no program ran")
    print(_title(record), measure.text_table(*_cells(record)), path, sep="\n")
    return int(any(row["wrong"] for row in record["rows"]))


def _save(options: argparse.Namespace, base: dict, results: dict, missing: dict, command: str) -> tuple[Path, dict]:
    """Writes the JSON and the chart of the rounds so far."""
    record = {
        "command": command,
        "machine": measure.machine(options.device, *PACKAGES),
        "setting": {**base, "model": options.model, "rounds": max(map(len, results.values()))},
        "not_measured": missing,
        "rows": [_row(options, label, runs) for label, runs in results.items()],
    }
    _compare(record["rows"])
    parts = ("generate", options.model, "b" + options.batch_sizes)
    path = measure.record_path(options.out, record["machine"]["device"], *parts)
    measure.save_record(path, record)
    measure.save_figure(_chart(record), path.with_suffix(".png"))
    return path, record
