"""Runs on several processes for tests and for the table of docs/scale.md.

`python -m tests.parallel table` trains the nano preset with 1, 2 and 4 processes, in float32 and bfloat16, and prints
the SHA-256 of the weights, the averages and the log. `python -m tests.parallel memory` prints what AdamW's state takes
of each process for gpt2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"def f{i}(x):\n    return x + {i % 7}\n\n" for i in range(3000))


def environment(cache: Path, **more: str) -> dict[str, str]:
    """One thread a process, as torchrun gives it to several."""
    return os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GPT2_FAST_CACHE": str(cache), "HF_HUB_OFFLINE": "1", **more,
    }  # fmt: skip


def command(world: int, *arguments: str, program: tuple[str, ...] = ("-m", "gpt2_fast"), **launch: object) -> list[str]:
    """torchrun's; launch: its own options, with underscores."""
    own = [f"--{name.replace('_', '-')}={value}" for name, value in launch.items()]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *own,
        *program, *map(str, arguments),
    ]  # fmt: skip


def run(world: int, *arguments: str, cwd: Path, timeout: float = 120, program=("-m", "gpt2_fast"), **launch):
    """A finished torchrun: returncode, stdout, stderr. Raises when it hangs."""
    return subprocess.run(
        command(world, *arguments, program=program, **launch), cwd=cwd, env=environment(cwd / "cache"),
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def ranks(launcher: int, world: int, patience: float = 60) -> list[int]:
    """The process ids of the ranks below a torchrun, as soon as all are there, in no order."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == launcher and fields[0] != "Z":
                found.append(int(path.parent.name))
        if len(found) >= world:
            return found
        time.sleep(0.05)
    raise TimeoutError(f"torchrun has not started {world} processes")


def log(out: Path, validations: tuple[int, ...] | None = None) -> list[dict]:
    """metrics.jsonl without what is measured by a clock. A line that is being written is left out.

    validations: leave out those of other steps, with which a resumed run begins.
    """
    records = []
    path = out / "metrics.jsonl"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            records.append({k: v for k, v in json.loads(line).items() if k != "tokens_per_second"})
    return [r for r in records if "loss" in r or validations is None or r["step"] in validations]


def wait_for_step(out: Path, step: int, launcher: subprocess.Popen, patience: float = 90) -> None:
    until = time.monotonic() + patience
    while not any(r["step"] >= step and "loss" in r for r in log(out)):
        if launcher.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"no step {step}: {launcher.communicate()[1] if launcher.poll() is not None else ''}")
        time.sleep(0.02)


def digests(out: Path, validations: tuple[int, ...] | None = None) -> dict[str, str]:
    """SHA-256 of the weights, the averages (with masters and step counts) and the log of a run's newest checkpoint."""
    import torch

    from gpt2_fast.checkpoint.run_folder import load_checkpoint

    def sha(items) -> str:
        found = hashlib.sha256()
        for name, t in items:
            found.update(name.encode())
            found.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    state = load_checkpoint(out)[0]
    averages = ((f"{i} {key}", t) for i, s in state.optimizer["state"].items() for key, t in s.items())
    lines = "\n".join(json.dumps(record) for record in log(out, validations))
    return {
        "weights": sha(state.model.items()),
        "averages": sha(averages),
        "log": hashlib.sha256(lines.encode()).hexdigest(),
    }


def table(steps: int, worlds: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        (cwd / "corpus.txt").write_text(TEXT)
        print("| dtype | W | weights | averages | log | seconds |\n| --- | --- | --- | --- | --- | --- |")
        for dtype in ("float32", "bfloat16"):
            for world in worlds:
                out, begun = cwd / f"{dtype}-{world}", time.monotonic()
                done = run(
                    world, "train", "--model", "nano", "--data", cwd / "corpus.txt", "--context", "64",
                    "--batch-size", "2", "--grad-accum", "8", "--dropout", "0.1", "--steps", steps, "--dtype", dtype,
                    "--eval-every", "0", "--eval-batches", "2", "--out", out, cwd=cwd, timeout=3600,
                )  # fmt: skip
                if done.returncode:
                    sys.exit(done.stderr)
                found = [digest[:16] for digest in digests(out).values()]
                seconds = f"{time.monotonic() - begun:.0f}"
                print("| " + " | ".join([dtype, str(world), *found, seconds]) + " |", flush=True)


def serve() -> None:
    """Runs jobs, a line of JSON each, in ranks that are forked from this process: it has imported everything already.

    A job: {"world", "arguments" of gpt2-fast, "cwd", "patience" seconds}, and where something is to happen in front of
    a step {"do", "rank", "step"}, do: the name of a signal to itself, "error" or "hang". The answer: the ranks'
    "codes" (None: killed because it hung), "stderr", "stdout", and "seconds" from the first end to the last.
    """
    import matplotlib.pyplot  # noqa: F401
    import torch.distributed  # noqa: F401

    import gpt2_fast.cli
    import gpt2_fast.train.loop  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_job(json.loads(line))), flush=True)


def _job(job: dict) -> dict:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # kept here, as torchrun keeps it
    outputs = [[tempfile.TemporaryFile("w+") for _ in range(2)] for _ in range(job["world"])]  # noqa: SIM115
    pids = []
    for rank, files in enumerate(outputs):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 99
            try:
                for number, file in enumerate(files, start=1):
                    os.dup2(file.fileno(), number)
                code = _rank(job, rank, store.port)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes, ends = dict.fromkeys(pids), []
    until = time.monotonic() + job.get("patience", 60)
    while None in codes.values() and time.monotonic() < until:
        for pid in [pid for pid, code in codes.items() if code is None]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                ends.append(time.monotonic())
        time.sleep(0.01)
    for pid in [pid for pid, code in codes.items() if code is None]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    texts = []
    for files in outputs:
        for file in files:
            file.seek(0)
        texts.append([file.read() for file in files])
    return {
        "codes": list(codes.values()), "stdout": [out for out, _ in texts], "stderr": [err for _, err in texts],
        "seconds": ends[-1] - ends[0] if ends else None,
    }  # fmt: skip


def _rank(job: dict, rank: int, port: int) -> int:
    from gpt2_fast.cli import main
    from gpt2_fast.train.step import Step

    world = str(job["world"])
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=world, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=world,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    os.chdir(job["cwd"])
    take = Step.__call__

    def call(self, inputs, targets, lr, step=0):
        if (rank, step) == (job.get("rank"), job.get("step")):
            if job["do"] == "error":
                raise ValueError("the disk of rank 1 is on fire")
            if job["do"] == "hang":
                time.sleep(600)
            os.kill(os.getpid(), getattr(signal, job["do"]))
        return take(self, inputs, targets, lr, step)

    Step.__call__ = call
    return main(job["arguments"])


_MEMORY = """
import sys, torch
from gpt2_fast import AdamW, GPT2Config, GPT2LMHeadModel
from gpt2_fast.parallel import join, leave
group = join(30)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config.from_preset(sys.argv[1]))
optimizer = AdamW(model.parameters())
optimizer.cast(model, torch.bfloat16)
optimizer.shard(group, 4)
held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for s in optimizer.state.values() for t in s.values()}.values())
print(f"| {group.world} | {group.rank} | {held / 1e6:,.1f} MB |", flush=True)
leave()
"""


def memory(model: str, worlds: list[int]) -> None:
    print("| W | rank | AdamW's state, bfloat16 weights |\n| --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "held.py").write_text(_MEMORY)
        for world in worlds:
            done = run(world, model, cwd=Path(folder), timeout=900, program=(f"{folder}/held.py",))
            if done.returncode:
                sys.exit(done.stderr)
            print("".join(sorted(done.stdout.splitlines(keepends=True))), end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel", description=__doc__)
    parser.add_argument("what", choices=("table", "memory", "serve"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    if arguments.what == "serve":
        serve()
    elif arguments.what == "table":
        table(arguments.steps, arguments.world)
    else:
        memory(arguments.model, arguments.world)


if __name__ == "__main__":
    main()
