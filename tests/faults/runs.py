"""One run in a fork of this process, under a plan. This process has imported everything, and has started no thread."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from .plans import NONE, SIGNALS, Event, Plan

SOURCE = Path(__file__).with_name("inject.c")
LIBRARY = "FAULT_LIBRARY"  # names the injector in a process that has it loaded
LIMIT_S = 60  # for one run
STEPS = 4
VARIABLES = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}


def build(folder: Path) -> Path:
    """The injector, compiled into a folder."""
    library = folder / "inject.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", str(SOURCE), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return library


def prepare(work: Path) -> list[str]:
    """Imports what a run imports, makes a tiny model and its data, and returns the arguments of a run on them."""
    os.environ["GPT2_FAST_CACHE"] = str(work / "cache")
    import torch
    import tqdm

    from gpt2_fast.checkpoint import expected_shapes, save_pretrained
    from gpt2_fast.cli import main
    from gpt2_fast.config import GPT2Config
    from gpt2_fast.data import load_data
    from gpt2_fast.report import figures

    assert torch.get_num_threads() == 1
    tqdm.tqdm.monitor_interval = 0  # no thread of its own
    # Drawing would be most of so short a run; an empty picture is written in the same way.
    figures.loss_figure = lambda records, title="": figures.Picture(figsize=(1, 1))
    config = GPT2Config(n_embd=16, n_head=1, n_layer=1, n_positions=16)
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(shape, generator=generator) * 0.1 for n, shape in expected_shapes(config).items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    save_pretrained(work / "model", weights, config)
    text = work / "corpus.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i % 7}\n\n" for i in range(300)))
    load_data(str(text), context=8)
    options = {"init-from": work / "model", "data": text, "steps": STEPS, "context": 8, "batch-size": 2, "warmup": 2,
               "dropout": 0.1, "eval-every": 1, "eval-batches": 1, "save-every": 1, "device": "cpu"}  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        main(["train", *arguments, "--out", str(work / "warm")])
    for _ in range(100):  # a thread that was joined is listed a moment longer
        if len(os.listdir("/proc/self/task")) == 1:
            return arguments
        time.sleep(0.05)
    raise AssertionError("a fork of a process with threads may hang")


@dataclass(frozen=True)
class Ended:
    """How a run ended: the exit status, or minus the signal; what it printed last; the calls it made."""

    status: int
    text: str
    events: list[Event]
    seconds: float

    def unclear(self, plan: Plan) -> str | None:
        """What a user could not make sense of, or None."""
        allowed = -getattr(signal, plan.do) if plan.do in SIGNALS else -signal.SIGKILL if plan.kills else 0
        if self.status < 0 and self.status != allowed:
            return f"ended by {signal.Signals(-self.status).name}"
        if self.status == 2 and not self.text.startswith("gpt2-fast: "):
            return f"an error that is not one line: {self.text}"
        if self.status not in (0, 2, 130) and self.status >= 0 and plan.do not in SIGNALS:
            return f"exit status {self.status}: {self.text}"
        return None


def run(arguments: list[str], root: Path, plan: Plan = NONE) -> Ended:
    """`gpt2-fast` with these arguments in a fork; calls below root count."""
    log, printed = root.parent / f"{root.name}.events", root.parent / f"{root.name}.printed"
    log.unlink(missing_ok=True)
    sys.stdout.flush()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(arguments, root, plan, log, printed)
    sent = plan.seconds is None
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - started
        if pid:
            break
        if not sent and passed >= plan.seconds:
            os.kill(child, getattr(signal, plan.do))
            sent = True
        if passed > LIMIT_S:
            os.kill(child, signal.SIGABRT)
        time.sleep(0.001)
    events = []
    for line in log.read_text().splitlines() if log.exists() else []:
        number, kind, rest = line.split(" ", 2)
        events.append(Event(int(number), kind, rest.rpartition(" ")[0]))
    lines = printed.read_text(errors="replace").splitlines() if printed.exists() else []
    return Ended(os.waitstatus_to_exitcode(status), lines[-1] if lines else "", events, passed)


def _child(arguments: list[str], root: Path, plan: Plan, log: Path, printed: Path) -> None:
    status = 1
    try:
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        from gpt2_fast.cli import main

        text = lambda value: str(value).encode()
        doing = b"" if plan.do in SIGNALS else plan.do.encode()
        ctypes.CDLL(os.environ[LIBRARY]).fault_plan(
            text(root), ctypes.c_long(plan.at), b"", doing, ctypes.c_long(plan.count), ctypes.c_double(plan.clock),
            text(log),
        )  # fmt: skip
        status = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
