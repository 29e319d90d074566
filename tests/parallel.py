"""Runs on several processes for tests and for the table of docs/scale.md.

`python -m tests.parallel table` trains the nano preset with 1, 2 and 4 processes, in float32 and bfloat16, and prints the
SHA-256 of the weights, the averages and the log. `python -m tests.parallel memory` prints what AdamW's state takes of
each process for gpt2.
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


def log(out: Path) -> list[dict]:
    """metrics.jsonl without what is measured by a clock. A line that is being written is left out."""
    records = []
    path = out / "metrics.jsonl"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            records.append({k: v for k, v in json.loads(line).items() if k != "tokens_per_second"})
    return records


def wait_for_step(out: Path, step: int, launcher: subprocess.Popen, patience: float = 90) -> None:
    until = time.monotonic() + patience
    while not any(r["step"] >= step and "loss" in r for r in log(out)):
        if launcher.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"no step {step}: {launcher.communicate()[1] if launcher.poll() is not None else ''}")
        time.sleep(0.02)


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of the weights, the averages (with masters and step counts) and the log of a run's newest checkpoint."""
    import torch

    from gpt2_fast.checkpoint import load_training_state

    def sha(items) -> str:
        found = hashlib.sha256()
        for name, t in items:
            found.update(name.encode())
            found.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    from gpt2_fast.checkpoint.run_folder import load_checkpoint

    state = load_checkpoint(out)[0] if (out / "checkpoint").exists() else load_training_state(out)
    averages = ((f"{i} {key}", t) for i, s in state.optimizer["state"].items() for key, t in s.items())
    lines = "\n".join(json.dumps(record) for record in log(out))
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
    parser.add_argument("what", choices=("table", "memory"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if arguments.what == "table":
        table(arguments.steps, arguments.world)
    else:
        memory(arguments.model, arguments.world)


if __name__ == "__main__":
    main()
