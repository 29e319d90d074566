"""What `benchmarks train` makes of what its workers measured: checks of losses, ratios, MFU, table and chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks import measure
from benchmarks.mfu import conventions
from benchmarks.programs import SIZES
from gpt2_fast import GPT2Config

# How far a loss may be from the truth's, as part of it: the first, of the same weights, so of the forward pass alone;
# and the later ones, of gradients and updates too. In 124M's first 50 steps float32 stays below a tenth of that, and
# bfloat16, by autocast or with bfloat16 weights, below half; a mask left out is beyond each, from the first loss on.
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (5e-4, 1e-2)}
SMALL_LOSS = 1.0  # below it a part of the loss says less and less: what is noise stays, and the loss goes to 0
# The truth, and what ratios are to: the first of these that ran, in float32 if any did.
TRUTH = ("reference", "transformers-eager-attention", "transformers", "nanogpt")
BASE = ("transformers", "transformers-eager-attention", "nanogpt", "reference")
HEADER = ("program", "tokens/s", "p20", "p80", "ratio", "gpt2_fast is", "MFU llm.c", "PaLM", "flash", "step 1 s",
          "peak GB", "launches", "losses", "error")  # fmt: skip


def complete(record: dict) -> None:
    """Adds to the rows of a record: whether their losses are right, and to those the ratios and MFU."""
    rows, setting = record["rows"], record["setting"]
    record["flops_per_token"] = conventions(GPT2Config(**SIZES[setting["model"]]), setting["context"])
    judge(rows)
    compare(
        rows, {dtype: peak["flops_per_second"] for dtype, peak in record["peaks"].items()}, record["flops_per_token"]
    )


def numbers(name: str, dtype: str) -> str:
    """How a program computes: "float32", "bfloat16" weights, or peers' float32 weights under "autocast"."""
    return dtype if dtype == "float32" or name.startswith(("gpt2_fast", "reference")) else "autocast"


def _first(rows: Sequence[dict], names: Sequence[str]) -> dict:
    """The row of the first of `names` that is there, in float32 if any is; without any of them the first row."""
    rank = lambda row: (row["dtype"] != "float32", names.index(row["name"]))
    return min((row for row in rows if row["name"] in names), key=rank, default=rows[0])


def judge(rows: Sequence[dict]) -> None:
    """Adds loss_error, the largest part by which a row's losses differ from the truth's, and whether that is noise.

    Of a loss below SMALL_LOSS, as one batch learnt by heart has, a part of SMALL_LOSS.
    """
    truth = _first(rows, TRUTH)
    for row in rows:
        pairs = zip(row["losses"], truth["losses"], strict=True)
        errors = [abs(loss - true) / max(abs(true), SMALL_LOSS) for loss, true in pairs]
        row["loss_error"] = max(errors) if all(e == e for e in errors) else float("inf")
        first, later = TOLERANCE[row["dtype"]]
        row["losses_agree"] = errors[0] <= first and row["loss_error"] <= later
        row["losses_to"] = truth["program"]


def compare(rows: Sequence[dict], peaks: Mapping[str, float], flops: Mapping[str, int]) -> None:
    """Adds ratio (to the base), gpt2_fast_is (times this row, in its dtype) and mfu; None where losses are wrong.

    peaks: FLOPs a second by dtype; flops: FLOPs a token by convention.
    """
    right = [row for row in rows if row["losses_agree"]]
    base = _first(right, BASE) if right else None
    for row in rows:
        row.update(ratio=None, ratio_to=base and base["program"], gpt2_fast_is=None, mfu=None)
    for row in right:
        row["ratio"] = measure.ratio(row["rounds"], base["rounds"])
        rate = row["tokens_per_second"]["median"]
        row["mfu"] = {name: rate * count / peaks[row["dtype"]] for name, count in flops.items()}
        if not _ours(row):
            ours = [r["rounds"] for r in right if _ours(r) and r["dtype"] == row["dtype"]]
            row["gpt2_fast_is"] = max((measure.ratio(r, row["rounds"]) for r in ours), default=None)


def _ours(row: Mapping) -> bool:
    return row["name"].startswith("gpt2_fast")


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def cells(row: Mapping) -> tuple[str, ...]:
    """A row of the table. A program whose losses are wrong has no speed in it."""
    speed = ("-",) * 9
    if row["losses_agree"]:
        speed = (
            *(f"{row['tokens_per_second'][key]:,.0f}" for key in ("median", "p20", "p80")),
            _times(row["ratio"]), _times(row["gpt2_fast_is"]),
            *(f"{row['mfu'][name]:.1%}" for name in ("llm.c", "palm", "flash")), f"{row['first_step_seconds']:.2f}",
        )  # fmt: skip
    error = f"{row['loss_error']:.0e}" + ("" if row["losses_agree"] else " WRONG")
    losses = f"{row['losses'][0]:.4f} .. {row['losses'][-1]:.4f}"
    return (row["program"], *speed, f"{row['peak_bytes'] / 1e9:.2f}", f"{row['launches']:,}", losses, error)


def title(record: Mapping) -> str:
    setting, host = record["setting"], record["machine"]
    threads = "" if host["device"] != host["processor"] else f", {host['threads']} threads"
    return (f"{setting['model']}, B = {setting['batch_size']}, T = {setting['context']}; {host['device']}{threads}, "
            f"torch {host['versions']['torch']}")  # fmt: skip


def notes(record: Mapping) -> list[str]:
    """What the columns mean, a line each."""
    row = record["rows"][0]
    lines = [
        f"ratio: to {row['ratio_to']}, median over rounds; error: of the losses, to {row['losses_to']}",
        "step 1: of the first process, torch.compile's compilation with it; "
        + ("launches: kernels, copies and graphs" if "GPU" in record["memory_is"] else "launches: calls of ops")
        + f"; peak: {record['memory_is']}",
    ]
    for dtype, peak in record["peaks"].items():
        lines.append(f"MFU in {dtype}: of {peak['flops_per_second'] / 1e12:.3g} TFLOP/s ({peak['what']})")
    return lines


def text(record: Mapping) -> str:
    """Title, table and notes."""
    table = measure.text_table(HEADER, [cells(row) for row in record["rows"]])
    return "\n".join([title(record), table, *notes(record)])


def markdown(record: Mapping) -> str:
    """The columns that a README has room for."""
    kept = [HEADER.index(name) for name in ("program", "tokens/s", "p20", "p80", "ratio", "gpt2_fast is", "peak GB")]
    pick = lambda row: [row[i] for i in kept]
    return measure.markdown_table(pick(HEADER), [pick(cells(row)) for row in record["rows"]])


def chart(record: Mapping):
    """A matplotlib Figure: tokens a second, and peak memory. Programs whose losses are wrong have no bar of speed."""
    rate, memory = [], []
    for row in record["rows"]:
        median, right = row["tokens_per_second"]["median"], row["losses_agree"]
        said = f"{median:,.0f} ({_times(row['ratio'])})" if right else "losses are wrong"
        rate.append((row["program"], median if right else 0.0, said, _ours(row)))
        memory.append((row["program"], row["peak_bytes"] / 1e9, f"{row['peak_bytes'] / 1e9:.2f}", _ours(row)))
    unit = f"tokens per second of a training step, median (ratio to {record['rows'][0]['ratio_to']})"
    return measure.bar_chart(title(record), (unit, rate), (f"peak memory, GB ({record['memory_is']})", memory))
