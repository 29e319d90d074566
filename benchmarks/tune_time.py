"""`python -m benchmarks tune` where there is a GPU: what is timed is checked first, and what was timed is kept.

A candidate runs in the op that launches it, with its values and gradients held to float64 by the rule of the tests; one
that is wrong is out, however fast. The fastest wins, unless what ships is within 1% of it. Rows that GPT-2 124M in half
precision reads come first. With a record the work goes on where it was cut off: its rows are not timed again.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.ops.harness import SIZES, Case, Size

WORTH = 1.01  # so many times as slow may what ships be, and stay
GPT2 = {"width": SIZES["cuda"].n_embd, "head_dim": SIZES["cuda"].head_dim}

Bench = Callable[[Callable[[], object]], float]  # a function of no arguments -> milliseconds


def key(op: str, row: dict) -> str:
    """What a row is for, as a word of the record."""
    from gpt2_fast.kernels import tuning

    return json.dumps([op, *(row.get(name) for name in tuning.SELECTORS)], sort_keys=True)


def nearness(row: dict) -> tuple:
    """What rows are sorted by: those that GPT-2 124M reads in half precision first."""
    shape = row.get("shape", {})
    far = sum(abs(math.log2(shape[name] / own)) for name, own in GPT2.items() if name in shape)
    return (row.get("itemsize", 2) == 4, far, bool(shape.get("dropout")))


def dtype_of(row: dict, device: str) -> torch.dtype:
    from gpt2_fast.kernels import aot, cards

    if row.get("itemsize", 2) == 4 or device == "cpu":
        return torch.float32
    return torch.bfloat16 if cards.ARCHS[aot.config_arch(torch.device("cuda"))].bfloat16 else torch.float16


def case_of(op: str, row: dict, device: str = "cuda") -> tuple[Case, str]:
    """The benchmark's case that launches the row's kernel, and the direction that does."""
    bench, name = {"bias": ("mlp", "case"), "linear_gelu": ("mlp", "whole")}.get(op, (op, "case"))
    shape, base = row.get("shape", {}), SIZES["cuda" if device == "cuda" else "smoke"]
    width = shape.get("width", base.n_embd)
    heads = max(1, width // shape["head_dim"]) if "head_dim" in shape else base.n_head
    rows = 1 if row["kernel"] == "matmul" else base.B  # the product of few rows
    size = Size(rows, min(base.T, 32 if rows == 1 else base.T), heads, width, base.vocab_size, product=base.product)
    make = getattr(importlib.import_module(f"benchmarks.ops.bench_{bench}"), name)
    case = make(size, dtype_of(row, device), device)
    backward = row["kernel"].startswith(("backward", "gelu_backward", "reduce", "column"))
    wanted = "backward" if backward else "forward+backward"
    return case, wanted if wanted in case.cost else next(iter(case.cost))


def target_of(case: Case, direction: str) -> Callable[[], object]:
    """What is timed: a function that may be called again and again."""
    target, setup = case.timed("gpt2_fast", direction)
    if setup is None:
        return target
    (outputs,), _ = setup()
    if direction != "backward":
        return lambda: target(outputs)
    leaves = [x for x in case.inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    ones = [torch.ones_like(o) for o in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, ones, retain_graph=True, allow_unused=True)


def checked(case: Case, dtype: torch.dtype, before: tuple | None) -> tuple[str, float | None, tuple | None]:
    """Why the op is wrong, or ""; its largest error, as a part of the tensor's largest value; the reference's runs.

    before: the third of these, of another candidate: the reference does not run again.
    """
    if case.check is not None:
        try:
            case.check(case.program("gpt2_fast"))
        except AssertionError as error:
            return str(error).splitlines()[0], None, None
        return "", None, None
    import numerics  # tests/

    inputs = case.check_inputs or case.inputs
    runs = numerics.runs_of(case.program("gpt2_fast"), case.programs["eager"], inputs, case.differentiable, before)
    (values, gradients), _, (true_values, true_gradients) = runs
    pairs = [*zip(values, true_values, strict=True), *zip(gradients, true_gradients, strict=True)]
    error = max(((a.double() - t).abs().max() / t.abs().max().clamp_min(1e-300)).item() for a, t in pairs)
    try:
        numerics.compare(*runs, dtype)
    except AssertionError as wrong:
        return str(wrong).splitlines()[0], error, runs
    return "", error, runs


def by_time(op: str, index: int, tried: Sequence[dict], bench: Bench, case: Case, direction: str) -> list[dict]:
    """Each candidate of one row: {"config", "ms", "error", "wrong"}, the fastest that is right first."""
    from gpt2_fast.kernels import tuning

    row, before, found = tuning.rows(op)[index], None, []
    dtype = next(x.dtype for x in case.inputs if isinstance(x, torch.Tensor) and x.is_floating_point())
    for config in tried:
        with tuning.trial(op, index, config):
            try:
                wrong, error, before = checked(case, dtype, before)
                ms = math.inf if wrong else bench(target_of(case, direction))
            except Exception as failure:  # too much shared memory, registers: this one is out
                wrong, error, ms = f"{type(failure).__name__}: {str(failure).splitlines()[0]}", None, math.inf
        found.append({"config": config, "ms": ms, "error": error, "wrong": wrong})
    found.sort(key=lambda result: result["ms"])
    ships = next((r for r in found if r["config"] == row["config"]), None)
    if ships is not None and ships["ms"] <= WORTH * found[0]["ms"] < math.inf:
        found.remove(ships)
        found.insert(0, ships)
    return found


class Record:
    """What was timed so far, in a file or in memory alone: rows by `key`, for one card and one Triton."""

    def __init__(self, path: str | None, command: str):
        import triton

        self.path, self.rows = path and Path(path), {}
        self.head = {
            "command": command, "machine": measure.machine("cuda" if torch.cuda.is_available() else "cpu"),
            "triton": triton.__version__,
        }  # fmt: skip
        if self.path and self.path.exists():
            old = measure.load_record(self.path)
            for name in ("triton", "machine"):
                before, now = (head[name] if name == "triton" else head[name]["device"] for head in (old, self.head))
                if before != now:
                    sys.exit(f"{path} is of {before}, this is {now}; give another --record, or remove it")
            self.rows = old["rows"]

    def add(self, name: str, results: list[dict]) -> None:
        """Keeps one row's results, the chosen first, and writes the file."""
        shown = [r | {"ms": r["ms"] if math.isfinite(r["ms"]) else None} for r in results]
        self.rows[name] = shown
        if self.path:
            measure.save_record(self.path, {**self.head, "rows": self.rows})


def time_rows(
    wanted: Sequence[tuple[str, int]], record: Record, seconds: float, candidates: Callable[[str, dict], list[dict]],
    bench: Bench, cases: Callable[[str, dict], tuple[Case, str]] = case_of,
) -> tuple[dict[tuple[str, int], dict], list[str]]:  # fmt: skip
    """The best configuration of each row, and the rows for which the time did not suffice.

    Args:
        wanted: (op, index of its row).
        seconds: after so many no further row is begun.
        candidates: (op, row) -> what is tried.
    """
    from gpt2_fast.kernels import tuning

    rows = {(op, index): tuning.rows(op)[index] for op, index in wanted}
    chosen, left, started = {}, [], time.monotonic()
    for (op, index), row in sorted(rows.items(), key=lambda entry: nearness(entry[1])):
        name = key(op, row)
        if name not in record.rows:
            if time.monotonic() - started > seconds:
                left.append(name)
                continue
            record.add(name, by_time(op, index, candidates(op, row), bench, *cases(op, row)))
        best = record.rows[name][0]
        print(measure.text_table(header(op, row), lines(record.rows[name], row["config"])) + "\n", flush=True)
        if not best["wrong"]:
            chosen[op, index] = best["config"]
    return chosen, left


def header(op: str, row: dict) -> tuple[str, ...]:
    return (" ".join([op, row["kernel"], str(row.get("shape", ""))]).strip(), "ms", "error", "says")


def lines(results: Sequence[dict], shipped: dict, most: int = 4) -> list[tuple[str, ...]]:
    """The table of one row: the best, and what ships wherever it stands."""
    shown = [r for i, r in enumerate(results) if i < most or r["config"] == shipped]
    show = lambda value, form: "" if value is None else form.format(value)
    return [
        (" ".join(f"{name.removeprefix('num_')}={value}" for name, value in r["config"].items())
         + (" (ships)" if r["config"] == shipped else ""),
         show(r["ms"], "{:.4f}"), show(r["error"], "{:.1e}"), r["wrong"][:60])
        for r in shown
    ]  # fmt: skip
