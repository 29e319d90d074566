"""`python -m benchmarks roofline`: writes the tables of ROOFLINE.md again, from cost() and the newest results.

A floor is max(bytes / bandwidth, FLOPs / rate), call by call; the step's is the sum over its calls. The text of
ROOFLINE.md is its own; what stands between `<!-- name -->` and `<!-- end name -->` is written here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import RESULTS, ROOT, markdown_table
from benchmarks.ops.harness import SIZES, Size
from gpt2_fast.config import GPT2Config, num_params
from gpt2_fast.ops import adamw, add_layernorm, attention, embedding, linear, linear_cross_entropy, mlp
from gpt2_fast.report.machine import card_peak

DOCUMENT = ROOT / "benchmarks" / "ROOFLINE.md"
# By NVIDIA's data sheet of the H100 SXM; 3.35 TB/s is its memory.
H100 = {"bytes": 3.35e12, "flops": card_peak("NVIDIA H100 SXM", "bfloat16")}


@dataclass(frozen=True)
class Use:
    """One op of the training step, `calls` times at one shape; `cost` by direction."""

    op: str
    place: str
    calls: int
    cost: dict[str, dict[str, int]]

    def total(self, key: str) -> int:
        """Bytes or FLOPs of a whole step."""
        return self.calls * sum(c[key] for c in self.cost.values())


def step(size: Size, itemsize: int, n_layer: int = 12) -> list[Use]:
    """The calls of one training step of GPT-2, in order, with weights and activations of `itemsize` bytes.

    mlp stands as its two halves, which is how results have it that are older than it.
    """
    N, C = size.B * size.T, size.n_embd
    head = linear_cross_entropy.cost(N, C, size.vocab_size, itemsize)
    both = {key: head["forward"][key] + head["backward"][key] for key in ("bytes", "flops")}
    return [
        Use("embedding", "", 1, embedding.cost(N, size.T, C, size.vocab_size, itemsize)),
        Use("add_layernorm", "first, no residual", 1, add_layernorm.cost(N, C, itemsize, residual=False)),
        Use("linear", "c_attn", n_layer, linear.cost(N, C, 3 * C, itemsize)),
        Use("attention", "", n_layer, attention.cost(size.B, size.T, size.n_head, size.head_dim, itemsize)),
        Use("linear", "attn.c_proj", n_layer, linear.cost(N, C, C, itemsize)),
        Use("layernorm_linear_gelu", "", n_layer, mlp.cost(N, C, 4 * C, itemsize, projects=False)),
        Use("linear", "mlp.c_proj", n_layer, linear.cost(N, 4 * C, C, itemsize)),
        Use("add_layernorm", "", n_layer, add_layernorm.cost(N, C, itemsize)),
        Use("linear_cross_entropy", "", 1, {"forward+backward": both}),
        Use("adamw", "with its clip", 1, {"step": adamw.cost(num_params(GPT2Config()), itemsize)["forward"]}),
    ]


def _seconds(cost: dict[str, int], peak: dict[str, float]) -> tuple[float, str]:
    """The floor of one call, and what sets it."""
    return max((cost[key] / peak[key], key) for key in ("bytes", "flops"))


def floors(size: Size, itemsize: int, peak: dict[str, float] | None) -> str:
    """Markdown: bytes and FLOPs of every call and direction and, given a peak, its floor."""
    header = ["op", "direction", "calls", "MB a call", "GFLOP a call"]
    header += ["floor, us a call", "bound by", "floor, ms a step"] if peak else []
    rows, total = [], 0.0
    uses = step(size, itemsize)
    for use in uses:
        for direction, cost in use.cost.items():
            row = [f"{use.op} {use.place}".strip(), direction, str(use.calls)]
            row += [f"{cost['bytes'] / 1e6:,.2f}", f"{cost['flops'] / 1e9:,.3f}"]
            if peak:
                seconds, bound = _seconds(cost, peak)
                total += use.calls * seconds
                row += [f"{seconds * 1e6:,.1f}", bound, f"{use.calls * seconds * 1e3:.3f}"]
            rows.append(row)
    last = ["**step**", "", "", f"{sum(u.total('bytes') for u in uses) / 1e6:,.0f}",
            f"{sum(u.total('flops') for u in uses) / 1e9:,.0f}"]  # fmt: skip
    rows.append(last + (["", "", f"**{total * 1e3:.2f}**"] if peak else []))
    text = markdown_table(header, rows)
    tokens = size.B * size.T
    return text + (f"\n\n{tokens:,} tokens in {total * 1e3:.2f} ms: at most {tokens / total:,.0f} tokens/s." if peak
                   else "")  # fmt: skip


def _measured_row(record: dict, dtype: str, use: Use, direction: str) -> tuple[dict, float] | None:
    """The result for one call, and what to multiply its seconds by: AdamW is timed on fewer parameters."""
    cost = use.cost[direction]
    for row in record["rows"]:
        if (row["op"], row["dtype"], row["direction"]) == (use.op, dtype, direction):
            if row["bytes"] == cost["bytes"] and row["flops"] == cost["flops"]:
                return row, 1.0
            if use.op == "adamw":
                return row, cost["flops"] / row["flops"]  # by elements: an older kernel moved other bytes
    return None


def measured(record: dict, dtype: str) -> tuple[str, float, float, str]:
    """Markdown; the step's floor and time in seconds by the calls that were timed; where most is above the floor."""
    header = ["op", "direction", "floor, ms a call", "bound by", "measured, ms a call", "of its floor's rate",
              "ms a step", "best other, ms a call"]  # fmt: skip
    rows, gaps, floor, time = [], [], 0.0, 0.0
    for use in step(Size(**{k: v for k, v in record["size"].items() if k != "name"}), 4 if dtype == "float32" else 2):
        for direction in use.cost:
            found = _measured_row(record, dtype, use, direction)
            if found is None:
                continue
            row, scale = found
            ours = row["programs"]["gpt2_fast"]
            others = [(entry["seconds"]["median"], name) for name, entry in row["programs"].items()
                      if name != "gpt2_fast" and not entry["wrong"]]  # fmt: skip
            seconds = scale * ours["seconds"]["median"]
            least = seconds * ours["percent_of_ceiling"] / 100  # both of the same turns
            floor += use.calls * least
            time += use.calls * seconds
            best = f"{scale * min(others)[0] * 1e3:.2f} ({min(others)[1]})" if others else ""
            name = f"{use.op} {use.place}".strip()
            gaps.append((use.calls * (seconds - least), f"{name} {direction}"))
            rows.append([name, direction, f"{least * 1e3:.2f}",
                         row["bound"], f"{seconds * 1e3:.2f}", f"{ours['percent_of_ceiling']:.0f}%",
                         f"{use.calls * seconds * 1e3:.1f}", best])  # fmt: skip
    rows.append(["**sum**", "", "", "", "", f"{100 * floor / time:.0f}%", f"**{time * 1e3:.0f}**", ""])
    largest = ", ".join(f"{name} {gap * 1e3:.0f}" for gap, name in sorted(gaps, reverse=True)[:4])
    return markdown_table(header, rows), floor, time, f"Most above its floor, ms a step: {largest}."


def newest(pattern: str, folder: Path = RESULTS) -> Path | None:
    """The result whose name ends in the latest date."""
    found = sorted(folder.glob(pattern), key=lambda path: (path.stem[-10:], path.name))
    return found[-1] if found else None


def measured_section(ops: Path, train: Path | None) -> str:
    """Both dtypes of one result of `benchmarks ops`, and the whole step beside them where it was timed."""
    record = json.loads(ops.read_text())
    size = Size(**{k: v for k, v in record["size"].items() if k != "name"})
    rates = ", ".join(f"{k} {1e3 * v:,.0f} GFLOP/s" for k, v in record["product_tflop_per_second"].items())
    host, versions = record["machine"], record["machine"]["versions"]
    parts = [f"From `results/{ops.name}` ({host['device']}, {host['threads']} thread(s), torch {versions['torch']}; "
             f"`{record['command']}`; seconds: {record['seconds']}): a copy of 1 GiB moves "
             f"{record['copy_gb_per_second']:.1f} GB/s; a {size.product}-cube product: {rates}."]  # fmt: skip
    whole = dict(_steps(train, record["machine"]["threads"])) if train else {}
    for dtype in dict.fromkeys(row["dtype"] for row in record["rows"]):
        text, floor, time, gaps = measured(record, dtype)
        tokens = size.B * size.T
        said = f"The calls sum to {time * 1e3:,.0f} ms ({tokens / time:,.0f} tokens/s); their floors to " \
               f"{floor * 1e3:,.0f} ms ({tokens / floor:,.0f} tokens/s)."  # fmt: skip
        if dtype in whole:
            said += f" The whole step ran at {whole[dtype]:,.0f} tokens/s (`results/{train.name}`)."
        parts += [f"{dtype}:", text, f"{said} {gaps}"]
    return "\n\n".join(parts)


def _steps(path: Path, threads: int) -> Iterator[tuple[str, float]]:
    """(dtype, tokens/s) of this package in a result of `benchmarks train` on as many threads."""
    record = json.loads(path.read_text())
    for row in record["rows"] if record["machine"]["threads"] == threads else ():
        name, _, dtype = row["program"].partition(" ")
        if name == "gpt2_fast":
            rate = row["tokens_per_second"]
            yield dtype, rate["median"] if isinstance(rate, dict) else rate


def sections() -> dict[str, str]:
    """Every table as it should stand now; the measured one only where there are results."""
    parts = {"floors cpu": floors(SIZES["cpu"], 4, None), "floors h100": floors(SIZES["cuda"], 2, H100)}
    for name, ops, train in (("measured cpu", "b4-t256", "b4-t256"), ("measured gpu", "b16-t1024", "b16-t1024")):
        if (found := newest(f"*-ops-gpt2-{ops}-*.json")) is not None:
            parts[name] = measured_section(found, newest(f"*-train-gpt2-{train}-*.json"))
    return parts


def fill(document: str, parts: dict[str, str]) -> str:
    """The document with its sections replaced. Raises ValueError when a marker is missing."""
    for name, text in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if document.count(start) != 1 or document.count(end) != 1:
            raise ValueError(f"{DOCUMENT.name} has no {start} ... {end}; put the markers back")
        pattern = re.escape(start) + ".*?" + re.escape(end)
        document = re.sub(pattern, lambda _, s=start, t=text, e=end: f"{s}\n\n{t}\n\n{e}", document, flags=re.DOTALL)
    return document


def main(argv: list[str]) -> int:
    """Writes the tables again and says what they were made from."""
    if argv:
        sys.exit("usage: python -m benchmarks roofline")
    parts = sections()
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), parts))
    print(f"{DOCUMENT}: {', '.join(parts)}")
    return 0
