"""Runs on several processes for tests and for the table of docs/scale.md.

`python -m tests.parallel table` trains the nano preset with 1, 2 and 4 processes, in float32 and bfloat16, and prints
the SHA-256 of the weights, the averages and the log. `python -m tests.parallel memory` prints what AdamW's state takes
of each process for gpt2. `python -m tests.parallel kills` kills a random rank at a random moment again and again,
goes on with another number of processes, and compares with a run that nothing happened to; it exits with 1 where bits
differ.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
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

    from gpt2_fast.checkpoint.run_folder import load_checkpoint

    def sha(items) -> str:
        found = hashlib.sha256()
        for name, t in items:
            found.update(name.encode())
            found.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    state = load_checkpoint(out)[0]
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
        for dtype in ("float32", "bfloat16", "float16"):
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


KILLED = (  # what is trained, each time with kills and without
    ("float32", {"dtype": "float32"}),
    ("bfloat16", {"dtype": "bfloat16"}),
    ("bfloat16, --order epoch", {"dtype": "bfloat16", "order": "epoch"}),
)


def kills(count: int, seed: int) -> bool:
    """Prints a row a kill and two a run; whether all runs came to the same bits."""
    print(f"seed {seed}\n\n| | W | what became of it | weights | averages | log |\n{'| --- ' * 6}|", flush=True)
    generator, same, steps, every = random.Random(seed), True, 4 * (count + 1), 12
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        (cwd / "corpus.txt").write_text(TEXT)
        for name, more in KILLED:
            given = {
                "model": "nano", "data": cwd / "corpus.txt", "context": 32, "batch_size": 1, "grad_accum": 8,
                "dropout": 0.1, "steps": steps, "save_every": 3, "eval_every": every, "eval_batches": 2, **more,
            }  # fmt: skip
            options = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]
            alone, out = cwd / f"{name} alone", cwd / f"{name} killed"
            whole = run(1, "train", *options, "--out", alone, cwd=cwd, timeout=600)
            if whole.returncode:
                sys.exit(whole.stderr)
            arguments = ["train", *options, "--out", str(out)]
            for _ in range(count):
                world = generator.choice((1, 2, 4, 8))
                what = _killed(world, arguments, out, cwd, steps, generator)
                print(f"| {name} | {world} | {what} | | | |", flush=True)
                arguments = ["train", "--resume", str(out)]
            world = generator.choice((1, 2, 4, 8))
            last = run(world, *arguments, cwd=cwd, timeout=600)
            if last.returncode:
                sys.exit(last.stderr)
            found = [digests(at) for at in (out, alone)]
            for who, how, digest in ((world, "ran to the end", found[0]), (1, "ran alone, nothing killed", found[1])):
                print(f"| {name} | {who} | {how} | " + " | ".join(d[:16] for d in digest.values()) + " |", flush=True)
            same &= found[0] == found[1]
    return same


def _killed(world: int, arguments: list[str], out: Path, cwd: Path, steps: int, generator: random.Random) -> str:
    """Starts a run, kills one of its ranks by SIGKILL, and says which and when, and when all had ended."""
    before = max((r["step"] for r in log(out) if "loss" in r), default=0)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command(world, *arguments), cwd=cwd, env=environment(cwd / "cache"), stdout=subprocess.DEVNULL,
            stderr=errors,
        )  # fmt: skip
        pids = ranks(process.pid, world)
        # Steps behind the newest checkpoint run again: at most three of these are new.
        wait_for_step(out, min(before + generator.randint(1, 3), steps), process, patience=300)
        time.sleep(generator.random() * 0.2)  # a step is shorter: any moment of one, or of a save
        victim = generator.choice(pids)
        rank = Path(f"/proc/{victim}/environ").read_bytes().split(b"\0RANK=")[1].partition(b"\0")[0].decode()
        os.kill(victim, signal.SIGKILL)
        at = time.monotonic()
        process.wait(120)
        seconds, left = time.monotonic() - at, [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if left or process.returncode == 0:
            errors.seek(0)
            sys.exit(f"torchrun's status {process.returncode}, processes left: {left}\n{errors.read()}")
    step = max((r["step"] for r in log(out) if "loss" in r), default=0)
    return f"rank {rank} killed after step {step}; all had ended {seconds:.1f} s later"


class Forks:
    """Runs programs in ranks that are forked from one process, which has imported everything already."""

    def __init__(self, cache: Path) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__, "serve"], env=environment(cache), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def __call__(self, world: int, program: str, *arguments: object, cwd: Path, **more: object) -> dict:
        """The answer to a job, see `serve`."""
        job = {"world": world, "program": program, "arguments": [*map(str, arguments)], "cwd": str(cwd), **more}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait(30)


def serve() -> None:
    """Runs jobs, a line of JSON each, in ranks that are forked from this process: it has imported everything already.

    A job: {"world", "program": a module whose `main` takes the list of "arguments", "cwd", "patience" seconds,
    "imports": what the program imports as it runs, "streams": see `_redirect`, "folders": in cwd, of
    each rank}, and where something is to happen in front of a step of training {"do", "rank", "step"}, do: the name of
    a signal to itself, "error", "hang", or "hang writing", whatever the step, a checkpoint. A job of "world" 0 is
    a process that nothing launched. The answer: the ranks' "codes" (None: killed, as it hung), "stderr", "stdout", and
    "seconds" from the first end to the last.
    """
    import torch.distributed  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        for name in (job["program"], *job.get("imports", ())):
            importlib.import_module(name)
        print(json.dumps(_job(job)), flush=True)


def _job(job: dict) -> dict:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # kept here, as torchrun keeps it
    outputs = [[tempfile.TemporaryFile("w+") for _ in range(2)] for _ in range(job["world"] or 1)]  # noqa: SIM115
    pids = []
    for rank, files in enumerate(outputs):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 99
            try:
                for number, file in enumerate(files, start=1):
                    os.dup2(file.fileno(), number)
                _redirect(job.get("streams"))
                code = _rank(job, rank, store.port)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes, ends = dict.fromkeys(pids), []
    hangs = pids[job["rank"]] if job.get("do", "").startswith("hang") else None
    until = time.monotonic() + job.get("patience", 60)
    while any(code is None for pid, code in codes.items() if pid != hangs) and time.monotonic() < until:
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


def _redirect(streams: str | None) -> None:
    """Standard streams of a process that cannot be written: "full" a disk without room, "closed" descriptors, "pipe" a
    stdout that nobody reads."""
    if streams == "full":
        for number in (1, 2):
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    elif streams == "closed":
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None  # as Python has them then
    elif streams == "pipe":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)


def _rank(job: dict, rank: int, port: int) -> int:
    world = str(job["world"])
    if job["world"]:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=world, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=world,
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
        )  # fmt: skip
    os.chdir(os.path.join(job["cwd"], job["folders"][rank] if "folders" in job else "."))
    if "do" in job:
        _disturb(job, rank)
    return sys.modules[job["program"]].main(job["arguments"]) or 0


def _disturb(job: dict, rank: int) -> None:
    from gpt2_fast.train import checkpoints
    from gpt2_fast.train.step import Step

    if job["do"] == "hang writing":
        if rank == job["rank"]:
            assert callable(checkpoints.save_checkpoint)  # here, or nothing would hang
            checkpoints.save_checkpoint = lambda *_, **__: time.sleep(600)
        return
    take = Step.__call__

    def call(self, inputs, targets, lr, step=0):
        if (rank, step) == (job["rank"], job["step"]):
            if job["do"] == "error":
                raise ValueError("the disk of rank 1 is on fire")
            if job["do"] == "hang":
                time.sleep(600)
            os.kill(os.getpid(), getattr(signal, job["do"]))
        return take(self, inputs, targets, lr, step)

    Step.__call__ = call


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
    parser.add_argument("what", choices=("table", "memory", "kills", "serve"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)), help="of the kills")
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    if arguments.what == "serve":
        serve()
    elif arguments.what == "kills":
        sys.exit(0 if kills(arguments.kills, arguments.seed) else "the bits differ")
    elif arguments.what == "table":
        table(arguments.steps, arguments.world)
    else:
        memory(arguments.model, arguments.world)


if __name__ == "__main__":
    main()
