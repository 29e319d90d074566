"""Where one training step of gpt2_fast goes: op by op its time, share and floor; on a GPU kernel by kernel too.

A floor is what the op's bytes or FLOPs, as `cost()` of its room counts them, would take at the rate of a copy or of
a large product measured in the same process (see ops/harness.py). An op's time is everything inside its call;
"products" is the part of it that matrix products take, the own or the vendor's. The gap is what is above the floor: the
largest first. On a CPU a layer is one operation in training; here its operations are called in turn, to be seen.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.ops.harness import floor_seconds
from benchmarks.programs import NO_DROPOUT, PROGRAMS, SIZES, Setting, batch
from gpt2_fast import GPT2Config
from gpt2_fast.config import num_params
from gpt2_fast.ops import adamw, add_layernorm, attention, embedding, linear, linear_cross_entropy, mlp
from gpt2_fast.ops.bound import Operations
from gpt2_fast.ops.runtime import products

VENDOR = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::_addmm_activation", "mkldnn::_linear_pointwise")
PRODUCTS = (products.PROFILED, *VENDOR)
Shapes = Sequence[Sequence[int]]


def _rows(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1])


def _sum(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {key: a[key] + b[key] for key in a}


def costs(config: GPT2Config, setting: Setting) -> dict[str, Callable[[Shapes], dict[str, int]]]:
    """By the name of an op, what turns the shapes of a call's inputs into its bytes and FLOPs."""
    size = torch.finfo(setting.dtype).bits // 8
    table = (config.vocab_size, size)
    fc_weight, proj_weight = (mlp.OP.backward_names.index(name) for name in ("fc_weight", "proj_weight"))

    def both(name: str, count: Callable[[Shapes], dict], backward: Callable[[Shapes], dict] | None = None) -> dict:
        return {name: lambda s: count(s)["forward"], f"{name}_backward": lambda s: (backward or count)(s)["backward"]}

    def head(s: Shapes) -> dict[str, int]:
        """Of linear_cross_entropy, whose one call makes the gradients besides the loss."""
        parts = linear_cross_entropy.cost(_rows(s[0]), s[0][-1], s[1][0], size)
        return _sum(parts["forward"], parts["backward"])

    return {
        **both("embedding", lambda s: embedding.cost(math.prod(s[2]), setting.context, s[0][1], *table),
               lambda s: embedding.cost(_rows(s[0]), setting.context, s[0][-1], *table)),
        **both("add_layernorm", lambda s: add_layernorm.cost(_rows(s[0]), s[0][-1], size, residual=bool(s[1]))),
        **both("linear", lambda s: linear.cost(_rows(s[0]), *s[1], size),
               lambda s: linear.cost(_rows(s[1]), *s[2], size)),
        **both("attention", lambda s: attention.cost(*s[0][:2], *s[0][3:], size),
               lambda s: attention.cost(*s[1][:2], *s[1][3:], size)),
        **both("mlp", lambda s: mlp.cost(_rows(s[0]), *s[4], size, projects=bool(s[6])),
               lambda s: mlp.cost(_rows(s[0]), *s[fc_weight], size, projects=bool(s[proj_weight]))),
        "linear_cross_entropy": head,
        "adamw": lambda s: adamw.cost(num_params(config), size)["forward"],
    }  # fmt: skip


def _owner(event) -> object | None:
    """The call that an event is part of: the outermost op of this package, else the outermost of torch's."""
    found = None
    while event is not None:
        if event.name.startswith("gpt2_fast::") or (
            event.name.startswith("aten::") and not (found and found.name.startswith("gpt2_fast::"))
        ):
            found = event
        event = event.cpu_parent
    return found


def _label(name: str, shapes: Shapes) -> str:
    """An op as the table calls it; linear is told apart by its weight, of torch's own only the name matters."""
    stem = name.removeprefix("gpt2_fast::")
    weight = {"linear": 1, "linear_backward": 2}.get(stem)
    return name if stem == name else stem if weight is None else f"{stem} {'x'.join(map(str, shapes[weight]))}"


def _seconds(event, device: str) -> float:
    return (event.device_time_total if device == "cuda" else event.cpu_time_total) * 1e-6


def by_op(events, setting: Setting, steps: int) -> list[dict]:
    """One row an op, of one step: calls, seconds, product seconds, floor in seconds, bytes, FLOPs; slowest first.

    The floor is None where the op has no cost().
    """
    count = costs(GPT2Config(**SIZES[setting.model], **NO_DROPOUT), setting)
    edge = 2048 if setting.device == "cpu" else 8192
    numbers = ("calls", "seconds", "product_seconds", "floor", "bytes", "flops")
    rows: dict[str, dict] = defaultdict(lambda: dict.fromkeys(numbers, 0.0))
    for event in events:
        if event.device_type != DeviceType.CPU or (owner := _owner(event)) is None:
            continue
        row = rows[_label(owner.name, owner.input_shapes)]
        if owner is event:
            row["calls"] += 1 / steps
            row["seconds"] += _seconds(event, setting.device) / steps
            if (cost := count.get(event.name.removeprefix("gpt2_fast::"))) is None:
                row["floor"] = None
                continue
            counted = cost(event.input_shapes)
            least, row["bound"] = floor_seconds(counted, edge, setting.dtype, setting.device)
            row["floor"] += least / steps
            row["bytes"] += counted["bytes"] / steps
            row["flops"] += counted["flops"] / steps
        elif event.name in PRODUCTS and owner.name.startswith("gpt2_fast::"):
            row["product_seconds"] += _seconds(event, setting.device) / steps
    return sorted(({"op": op, **row} for op, row in rows.items()), key=lambda row: -row["seconds"])


def by_kernel(events, steps: int) -> list[dict]:
    """One row a GPU kernel: launches and seconds of one step, slowest first."""
    rows: dict[str, dict] = defaultdict(lambda: {"launches": 0.0, "seconds": 0.0})
    for event in events:
        if event.device_type == DeviceType.CUDA:
            rows[event.name]["launches"] += 1 / steps
            rows[event.name]["seconds"] += event.time_range.elapsed_us() * 1e-6 / steps
    return sorted(({"kernel": name, **row} for name, row in rows.items()), key=lambda row: -row["seconds"])


def measure_step(program: str, setting: Setting, steps: int) -> dict:
    """Profiles `steps` steps after three: {"seconds" of a step, "ops", "kernels"}."""
    step, data = PROGRAMS[program].build(setting), batch(setting)
    for _ in range(3):
        step(*data)
    started = measure.clock(setting.device)
    for _ in range(steps):
        step(*data)
    seconds = (measure.clock(setting.device) - started) / steps
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (setting.device == "cuda")
    Operations.whole_layers = False
    try:
        with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
            for _ in range(steps):
                step(*data)
            measure.clock(setting.device)
    finally:
        Operations.whole_layers = True
    del step, data
    events = profiler.events()
    return {"seconds": seconds, "ops": by_op(events, setting, steps), "kernels": by_kernel(events, steps)}


def text(result: dict) -> str:
    """The tables, and the largest gaps between an op and its floor."""
    total = sum(row["seconds"] for row in result["ops"])
    table = []
    for row in [row for row in result["ops"] if row["seconds"] > 1e-3 * total]:
        known = row["floor"] is not None
        table.append((
            row["op"], f"{row['calls']:.0f}", f"{row['seconds'] * 1e3:.2f}", f"{row['seconds'] / total:.1%}",
            f"{row['product_seconds'] * 1e3:.2f}", f"{row['floor'] * 1e3:.2f}" if known else "-",
            row["bound"] if known else "-", f"{(row['seconds'] - row['floor']) * 1e3:.2f}" if known else "-",
        ))  # fmt: skip
    known = [row for row in result["ops"] if row["floor"] is not None]
    floor = sum(row["floor"] for row in known)
    lines = [
        measure.text_table(("op", "calls", "ms", "share", "products", "floor", "bound", "gap"), table),
        f"a step takes {result['seconds'] * 1e3:.1f} ms without the profiler; its ops {total * 1e3:.1f} ms with it, "
        f"and the floors of those that have one {floor * 1e3:.1f} ms",
        "largest gaps: " + ", ".join(
            f"{row['op']} {(row['seconds'] - row['floor']) * 1e3:.1f} ms"
            for row in sorted(known, key=lambda row: row["floor"] - row["seconds"])[:3]),
    ]  # fmt: skip
    if result["kernels"]:
        busy = sum(row["seconds"] for row in result["kernels"])
        rows = [
            (r["kernel"][:90], f"{r['launches']:.0f}", f"{r['seconds'] * 1e3:.3f}", f"{r['seconds'] / busy:.1%}")
            for r in result["kernels"][:40]
        ]
        lines += ["", measure.text_table(("kernel", "launches", "ms", "share"), rows)]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Prints the tables; with --out writes them as JSON besides."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks profile_step", description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", default="gpt2", choices=SIZES)
    parser.add_argument("--batch-size", type=int, default=4 if device == "cpu" else 32)
    parser.add_argument("--context", type=int, default=256 if device == "cpu" else 1024)
    parser.add_argument(
        "--dtype", default="float32" if device == "cpu" else "bfloat16", choices=("float32", "bfloat16")
    )
    parser.add_argument("--program", default="gpt2_fast", choices=PROGRAMS, help="peers have no floors")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", metavar="FOLDER", help="writes the JSON there")
    given = parser.parse_args(argv)
    setting = Setting(given.model, getattr(torch, given.dtype), device, given.batch_size, given.context)
    result, host = measure_step(given.program, setting, given.steps), measure.machine(device)
    shape = f"{given.model}, B = {given.batch_size}, T = {given.context}"
    print(
        f"{given.program} {given.dtype}, {shape}; {host['device']}, torch {host['versions']['torch']}\n{text(result)}"
    )
    if given.out:
        name = ("profile", given.program, given.model, given.dtype, f"b{given.batch_size}", f"t{given.context}")
        path = measure.record_path(given.out, host["device"], *name)
        command = measure.command_line("profile_step", argv)
        measure.save_record(path, {"command": command, "machine": host, **result})
        print(path)
    return 0
