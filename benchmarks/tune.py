"""`python -m benchmarks tune`: chooses the configurations of kernels/configs/<op>.json, outside any run.

On a GPU each candidate is checked and timed in its op, at GPT-2 124M's shapes, by triton.testing.do_bench; the fastest
wins (tune_time.py). Where a kernel stands beside a vendor's product (`linear_gelu`), the vendor's is a candidate too.
Without one, or with --arch, candidates are compiled and ranked by what their machine code says, in this order:

1. no spilled registers, and no more shared memory than a block of that architecture may have (sm_80: than one of
   sm_86, sm_89 and sm_120, which take its rows);
2. for the matrix kernels the architecture's own tensor-core instruction (UTCHMMA, HGMMA, HMMA), where it can have one;
3. warps resident on a multiprocessor, up to as many as hide latency (8 for matrix kernels, 32 for the others): what
   registers, shared memory and warps allow;
4. the larger tile, which reads its operands less often, or keeps more loads in flight;
5. what ships; then fewer registers.

This cannot see latency: the tables change only with --write.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.measure import ROOT, command_line, text_table

# Per multiprocessor (CUDA C++ Programming Guide, "Technical Specifications"): bytes of shared memory, warps.
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
WARPS = 64
REGISTERS = 65536
BEST_MMA = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
MATRIX = {"attention": ("forward", "backward_dq", "backward_dkdv"), "mlp": ("matmul",),
          "linear_gelu": ("forward", "backward")}  # fmt: skip
ENOUGH_WARPS = {True: 8, False: 32}
INSPECTED = 3  # configurations of one row that are compiled for a candidate, of all that read the row


def candidates(op: str, row: dict, timed: bool = False) -> list[dict]:
    """The shipped configuration, the row's own candidates, and the neighbours of what ships, nearest first: every tile
    edge halved, kept or doubled, warps likewise, and one stage more or less. timed: with the vendor's product, once,
    where the row chooses; machine code says nothing of that choice."""
    shipped = row["config"]
    choices = {}
    for name, value in shipped.items():
        if name.startswith("BLOCK") or name == "ROWS":
            low = 16 if op in MATRIX and row["kernel"] in MATRIX[op] else 1
            choices[name] = [value, *(v for v in (value // 2, value * 2) if v >= low)]
        elif name == "num_warps":
            choices[name] = [value, *(v for v in (value // 2, value * 2) if 1 <= v <= 16)]
        elif name == "product" and timed:
            choices[name] = ["vendor", "persistent"]
        elif name in ("num_stages", "STAGES"):
            choices[name] = [value, *(v for v in (value - 1, value + 1) if 1 <= v <= 5)]
        else:
            choices[name] = [value]
    found = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    if timed and "product" in shipped:  # whose tiles are not launched
        found = [c for c in found if c == {**shipped, "product": "vendor"} or c["product"] == "persistent"]
    near = sorted(found, key=lambda c: sum(c[name] != shipped[name] for name in shipped))
    own = row.get("candidates", [])
    return [shipped, *own, *(c for c in near if c != shipped and c not in own)]


def affected(op: str, index: int, arch: int) -> list[int]:
    """Which of the op's aot_specs read row `index` on `arch`: those that change when the row does."""
    from gpt2_fast.kernels import tuning

    module = importlib.import_module(f"gpt2_fast.kernels.{op}")
    before = module.aot_specs()
    shipped = tuning.rows(op)[index]["config"]
    probe = {name: value if name == "product" else 2 * value for name, value in shipped.items()}
    with tuning.trial(op, index, probe):
        after = module.aot_specs()
    return [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b and arch in a.archs]


def compile_candidate(job: tuple[str, int, int, dict[str, int], tuple[int, ...]]) -> dict | str:
    """The worst of what the machine code of the given specs needs with one candidate; or why it does not compile."""
    op, index, arch, candidate, specs = job
    os.environ.pop("TRITON_INTERPRET", None)
    from gpt2_fast.kernels import aot, cards, tuning

    with tuning.trial(op, index, candidate):
        listed = importlib.import_module(f"gpt2_fast.kernels.{op}").aot_specs()
    try:
        reports = [aot.inspect(aot.compile_spec(listed[i], arch)) for i in specs]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    worst = {key: max(r[key] for r in reports) for key in ("registers", "spilled_bytes", "shared_bytes")}
    worst["loops"] = [loop for r in reports for loop in r["loops"]]
    worst["problems"] = aot.problems({**worst, "shared_limit": cards.ARCHS[86 if arch == 80 else arch].shared})
    worst["mma"] = set.intersection(*(set(r["mma"]) for r in reports))
    return worst


def resident_warps(report: dict, num_warps: int, arch: int) -> int:
    """Warps of one kernel that fit a multiprocessor, by registers (handed out to a warp by 256), shared memory (1 KiB
    of it is each block's own) and the limit."""
    per_warp = -(-report["registers"] * 32 // 256) * 256
    by_registers = REGISTERS // (per_warp * num_warps)
    by_shared = SHARED[arch] // (report["shared_bytes"] + 1024)
    return min(by_registers, by_shared, WARPS // num_warps, 32) * num_warps


def rank(op: str, kernel: str, arch: int, candidate: dict[str, int], report: dict | str) -> tuple:
    """What candidates are sorted by, best first; see the top of the file."""
    if isinstance(report, str):
        return (1, 1, 0, 0, 0)
    matrix = kernel in MATRIX.get(op, ())
    warps = min(resident_warps(report, candidate["num_warps"], arch), ENOUGH_WARPS[matrix])
    tile = math.prod(v for name, v in candidate.items() if name.startswith("BLOCK") or name == "ROWS")
    slow = matrix and BEST_MMA[arch] not in report["mma"]
    return (bool(report["problems"]), slow, -warps, -tile, report["registers"])


def by_machine_code(op: str, index: int, arch: int, pool, limit: int) -> list[tuple[tuple, dict, dict | str]]:
    """(rank, candidate, report) of the candidates of one row, best first."""
    from gpt2_fast.kernels import tuning

    row = tuning.rows(op)[index]
    specs = tuple(affected(op, index, arch)[:INSPECTED])
    tried = candidates(op, row)[:limit]
    reports = pool.map(compile_candidate, [(op, index, arch, c, specs) for c in tried])
    ranked = [(rank(op, row["kernel"], arch, c, r), c, r) for c, r in zip(tried, reports, strict=True)]
    return sorted(ranked, key=lambda entry: (entry[0][:-1], entry[1] != row["config"], entry[0][-1]))


def _rows_to_tune(ops: Sequence[str], arch: int, kernel: str | None) -> Iterator[tuple[str, int]]:
    from gpt2_fast.kernels import cards, tuning

    for op in ops:
        for index, row in enumerate(tuning.rows(op)):
            read = row.get("arch", arch) in cards.lineage(arch)
            if read and kernel in (None, row["kernel"]) and affected(op, index, arch):
                yield op, index


def _cells(candidate: dict, result, shipped: bool, arch: int) -> tuple[str, ...]:
    """One line of the table."""
    tile = " ".join(f"{name.removeprefix('num_')}={value}" for name, value in candidate.items())
    tile += " (ships)" if shipped else ""
    if isinstance(result, str):
        return tile, "", "", "", "", result[:60]
    warps = resident_warps(result, candidate["num_warps"], arch)
    said = "; ".join(result["problems"]) or ", ".join(sorted(result["mma"])) or "no tensor cores"
    return tile, str(result["registers"]), str(result["spilled_bytes"]), str(result["shared_bytes"]), str(warps), said


def _arguments(argv: Sequence[str], known: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ops", nargs="+", choices=known, default=known, metavar="OP", help=", ".join(known))
    parser.add_argument("--kernel", help="one kernel of the op")
    parser.add_argument("--arch", type=int, choices=sorted(SHARED),
                        help="rank by machine code for this architecture; default: the GPU here, else 90")  # fmt: skip
    parser.add_argument("--candidates", type=int, default=27, help="at most so many a row")
    parser.add_argument("--show", type=int, default=4, help="lines a row")
    parser.add_argument("--record", metavar="FILE.json", help="on a GPU: keep what was timed there, and go on from it")
    parser.add_argument("--seconds", type=float, default=math.inf, help="on a GPU: begin no further row after so many")
    parser.add_argument("--write", action="store_true", help="put the best of each row into kernels/configs")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Prints each row's candidates, best first, and with --write puts the first into the table."""
    import torch
    import triton
    from gpt2_fast.kernels import aot, cards, tuning

    options = _arguments(argv, sorted(path.stem for path in tuning.FOLDER.glob("*.json")))
    timed = options.arch is None and torch.cuda.is_available()
    arch = aot.config_arch(torch.device("cuda")) if timed else options.arch or 90
    by = f"do_bench, {torch.cuda.get_device_name()}" if timed else f"ranked machine code, {cards.label(arch)}"
    wanted = list(_rows_to_tune(options.ops, arch, options.kernel))
    if not wanted:
        sys.exit(f"no kernel {options.kernel!r} in {', '.join(options.ops)} for {cards.label(arch)}")
    if timed:
        chosen, left = _by_time(options, wanted, argv)
    else:
        chosen, left = _by_machine_code(options, wanted, arch), []
    for name in left:
        print(f"not timed: {name}")
    if options.write:
        _write(chosen, arch, f"{by}, triton {triton.__version__}")
    return 0


def _by_machine_code(options: argparse.Namespace, wanted: Sequence[tuple[str, int]], arch: int) -> dict:
    """The best candidate of each row by its machine code; prints the first few."""
    from gpt2_fast.kernels import cards, tuning

    chosen: dict[tuple[str, int], dict] = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for op, index in wanted:
            row = tuning.rows(op)[index]
            ranked = by_machine_code(op, index, arch, pool, options.candidates)
            title = " ".join([op, row["kernel"], cards.label(arch), str(row.get("shape", ""))]).strip()
            lines = [_cells(c, r, c == row["config"], arch) for _, c, r in ranked[: options.show]]
            print(text_table((title, "registers", "spilled", "shared", "warps", "says"), lines) + "\n", flush=True)
            if not isinstance(ranked[0][2], str):
                chosen[op, index] = ranked[0][1]
    return chosen


def _by_time(options: argparse.Namespace, wanted: Sequence[tuple[str, int]], argv: list[str]) -> tuple[dict, list]:
    from triton.testing import do_bench

    from benchmarks import tune_time

    sys.path.insert(0, str(ROOT / "tests"))  # numerics, the rule of what is right
    record = tune_time.Record(options.record, command_line("tune", argv))
    first = lambda op, row: candidates(op, row, timed=True)[: options.candidates]
    bench = lambda run: do_bench(run, return_mode="median")
    return tune_time.time_rows(wanted, record, options.seconds, first, bench)


def _write(chosen: dict[tuple[str, int], dict], arch: int, by: str) -> None:
    """Puts the choices into the tables; a row for all architectures, or of one whose rows this one takes, is joined by
    one for this one."""
    from gpt2_fast.kernels import tuning

    for op in dict.fromkeys(op for op, _ in chosen):
        table = []
        for index, row in enumerate(tuning.rows(op)):
            best = chosen.get((op, index))
            changed = best is not None and best != row["config"]
            if not changed or row.get("arch") != arch:
                table.append(row)
            if changed:
                table.append({**row, "arch": arch, "config": best, "by": by})
                if "candidates" in row:  # what was launched so far stays within reach
                    others = [row["config"], *row["candidates"]]
                    table[-1]["candidates"] = [c for c in others if c != best]
        table = [{key: row[key] for key in tuning.KEYS if key in row} for row in table]
        tuning.write(op, table)
        print(f"{tuning.path(op)}: {sum(row['by'] == by for row in table)} rows changed")
