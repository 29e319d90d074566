"""`pytest benchmarks`: every op's forward and backward beside eager PyTorch, torch.compile and the library's own op.

First the op is held to float64 by the rule of tests/numerics.py, then the programs take turns, round after round,
each timed by pytest-benchmark. At the end: one table, and with --results FOLDER a JSON and a chart. Shapes are those
of GPT-2 124M, B = 4, T = 256 on a CPU and B = 16, T = 1024 on a GPU, which is used where there is one.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from benchmarks.ops import harness, report
from benchmarks.ops.harness import PROGRAMS, SIZES, Case
from gpt2_fast.ops.runtime.memory import retain_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("float32", "bfloat16")
ROWS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("ops", "benchmarks of ops")
    group.addoption("--smoke", action="store_true", help="a size that only shows that everything runs")
    group.addoption("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    group.addoption("--programs", nargs="+", choices=PROGRAMS, default=None, help="default: all; --smoke: no compile")
    group.addoption("--turns", type=int, default=None, help="how often each program is measured (3; --smoke: 1)")
    group.addoption("--turn-seconds", type=float, default=0.4, help="about how long a turn takes")
    group.addoption("--cpu-seconds", action="store_true", help="one thread and its CPU time: for a machine in use")
    group.addoption("--results", metavar="FOLDER", help="where the JSON and the chart go; default: nowhere")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table knows neither bytes nor FLOPs
    config.stash[ROWS] = {}
    if config.getoption("smoke"):
        torch.set_num_threads(1)
    if config.getoption("cpu_seconds"):
        if DEVICE != "cpu":
            raise pytest.UsageError("--cpu-seconds is for a CPU; hide the GPU: CUDA_VISIBLE_DEVICES=")
        harness.count_cpu_seconds()
    retain_memory()  # as in training: freed pages stay in the process, for every program alike
    torch.manual_seed(0)


def _options(config) -> tuple[tuple[str, ...], int]:
    smoke = config.getoption("smoke")
    programs = config.getoption("programs") or [p for p in PROGRAMS if not (smoke and p == "compile")]
    return tuple(programs), config.getoption("turns") or (1 if smoke else 3)


def pytest_generate_tests(metafunc):
    if "measure" in metafunc.fixturenames:
        programs, turns = _options(metafunc.config)
        programs = [p for p in programs if p != "library" or hasattr(metafunc.module, "LIBRARY")]
        dtypes = metafunc.config.getoption("dtypes")
        plan = list(itertools.product(dtypes, metafunc.module.DIRECTIONS, range(turns), programs))
        metafunc.parametrize("measure", plan, ids=["-".join(map(str, p)) for p in plan], indirect=True)


_cases: dict[tuple, Case] = {}


def _case(make, size: str, dtype: torch.dtype) -> Case:
    """One case at a time is in memory."""
    key = (make, size, dtype)
    if key not in _cases:
        _cases.clear()
        _cases[key] = make(SIZES[size], dtype, DEVICE)
    return _cases[key]


@pytest.fixture
def measure(request, benchmark):
    """measure(case): checks and times one program of the case that `case(size, dtype, device)` makes."""
    dtype_name, direction, _turn, program = request.param
    config = request.config
    size = "smoke" if config.getoption("smoke") else DEVICE
    dtype = getattr(torch, dtype_name)
    benchmark._timer = harness.TIMER

    def run(make) -> None:
        case = _case(make, size, dtype)
        verdict = case.verdict(program, dtype)
        target, setup = case.timed(program, direction)
        seconds = _once(target, setup)  # compiles, warms up, and says how many rounds a turn has
        floor, bound = harness.floor_seconds_now(case.cost[direction], SIZES[size].product, dtype, DEVICE)
        rounds = 3 if config.getoption("smoke") else int(config.getoption("turn_seconds") / max(seconds, 1e-6))
        benchmark.pedantic(target, setup=setup, rounds=max(1, min(200, rounds)))
        op = case.op or request.module.__name__.rpartition("bench_")[2]
        key = (op, case.shape, dtype_name, direction)
        row = config.stash[ROWS].setdefault(key, report.new_row(*key, case.cost[direction]))
        row["bound"] = bound
        label = request.module.LIBRARY if program == "library" else program
        report.add(row, program, label, verdict, benchmark.stats.stats.data if benchmark.stats else [seconds], floor)
        if program == "gpt2_fast" and verdict:
            pytest.fail(f"wrong, so no speed is reported: {verdict}", pytrace=False)

    return run


def _once(target, setup) -> float:
    args, kwargs = setup() if setup else ((), {})
    start = harness.TIMER()
    target(*args, **kwargs)
    return harness.TIMER() - start


def pytest_terminal_summary(terminalreporter, config):
    rows = [report.finish(row) for row in config.stash[ROWS].values()]
    if not rows:
        return
    size = "smoke" if config.getoption("smoke") else DEVICE
    record = report.record(rows, size, DEVICE, config.invocation_params.args)
    record["seconds"] = "CPU, of one thread" if config.getoption("cpu_seconds") else "elapsed"
    terminalreporter.ensure_newline()
    for line in report.table(record):
        terminalreporter.write_line(line)
    if config.getoption("results"):
        terminalreporter.write_line(str(report.write(record, Path(config.getoption("results")))))
