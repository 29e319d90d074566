"""A token of one sequence on a CPU beside the reading of its weights once, which it cannot be faster than.

Several greedy tokens in one call, and as many readings, take turns in one process, in random order, on the same memory
and threads: what the last token left in the caches, the next one finds. The reading loop is compiled when it is
asked for (benchmarks/reading.cpp, by CXX, g++ or c++).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.programs import SIZES
from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.generate.decoders import packed_model
from gpt2_fast.generate.loop import AT_ONCE
from gpt2_fast.ops.decode_tokens import decode_tokens
from gpt2_fast.ops.draw import Scratch
from gpt2_fast.ops.packed_model import PackedCache, PackedModel

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
LINE = 64  # bytes
HELD = 128  # positions that the cache holds at first; it is read too, and is no part of the weights


def compile_reader() -> Callable[[Sequence[Tensor], int], int]:
    """(matrices, threads) -> the sum of their 4-byte words modulo 2^32. Raises SystemExit where nothing compiles it."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "reading.so"
        compiler = os.environ.get("CXX") or ("g++" if shutil.which("g++") else "c++")
        command = [*shlex.split(compiler), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        try:
            source = Path(__file__).with_suffix(".cpp")
            subprocess.run([*command, str(source), "-o", str(library)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
            sys.exit(f"benchmarks reading: {command[0]} does not compile the reading loop ({said}); name one by CXX")
        read_once = ctypes.CDLL(str(library)).read_once
    read_once.restype = ctypes.c_uint32

    def read(matrices: Sequence[Tensor], threads: int) -> int:
        addresses = (ctypes.c_void_p * len(matrices))(*(m.data_ptr() for m in matrices))
        lines = (ctypes.c_int64 * len(matrices))(*(m.nbytes // LINE for m in matrices))
        return read_once(addresses, lines, ctypes.c_int64(len(matrices)), threads)

    return read


def matrices_of(packed: PackedModel) -> list[Tensor]:
    """What every step reads whole, in its order; a token's row of the embedding is left out unless it is the head."""
    return [*(m.panels for layer in packed.layers for m in layer.matrices), packed.lm_head.panels]


def turns(packed: PackedModel, read: Callable, rounds: int, threads: int, held: int = HELD) -> dict[str, list[float]]:
    """Seconds of a token and of a reading of each round; the cache holds `held` to twice as many positions."""
    generator, matrices, scratch = random.Random(0), matrices_of(packed), Scratch()
    seconds: dict[str, list[float]] = {"token": [], "reading": []}
    token, logits, cache = torch.tensor([0]), torch.empty(1, packed.config.vocab_size), None
    count = min(AT_ONCE, held)

    def tokens() -> None:
        decode_tokens(packed, token, cache, count, scratch=scratch, out=logits)

    def readings() -> None:
        for _ in range(count):
            read(matrices, threads)

    for _ in range(rounds):
        if cache is None or cache.length + count > cache.n_positions:
            cache = PackedCache(packed, 1, 2 * held)
            packed.prefill(torch.zeros(1, held, dtype=torch.int64), cache)
        ways = {"token": tokens, "reading": readings}
        for way in generator.sample(sorted(ways), 2):
            started = time.perf_counter()
            ways[way]()
            seconds[way].append((time.perf_counter() - started) / count)
    return seconds


def table(rows: Sequence[dict]) -> str:
    """Medians; the share is that of the rounds' ratios."""
    body = []
    for row in rows:
        token, reading = median(row["token"]), median(row["reading"])
        share = median(r / t for r, t in zip(row["reading"], row["token"], strict=True))
        body.append([row["weights"], f"{row['bytes'] / 1e6:,.1f}", f"{1e3 * reading:.2f}", f"{1e3 * token:.2f}",
                     f"{row['bytes'] / reading / 1e9:.1f}", f"{share:.0%}"])  # fmt: skip
    return measure.text_table(["weights", "MB", "ms reading", "ms a token", "GB/s reading", "share"], body)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks reading", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2", choices=SIZES)
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="several by comma (default: all)")
    parser.add_argument("--rounds", type=int, default=100, help="turns of each way (default 100)")
    parser.add_argument("--held", type=int, help=f"positions in the cache at first (default {HELD}, or what fits)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder for the JSON")
    options = parser.parse_args(argv)
    options.weights = options.weights.split(",")
    if unknown := [name for name in options.weights if name not in WEIGHTS]:
        parser.error(f"--weights has {unknown[0]!r}; choose from {', '.join(WEIGHTS)}")
    most = GPT2Config(**SIZES[options.model]).n_positions // 2  # a cache of twice as many is filled
    options.held = min(HELD, most) if options.held is None else options.held
    if min(options.rounds, options.threads, options.held) < 1:
        parser.error("--rounds, --threads and --held must be at least 1")
    if options.held > most:
        parser.error(f"--held must be at most {most} for {options.model}")
    return options


def main(argv: Sequence[str]) -> int:
    options = _arguments(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    read, rows = compile_reader(), []
    model = GPT2LMHeadModel(GPT2Config(**SIZES[options.model])).eval()
    for weights in options.weights:
        packed = packed_model(model, weights)
        nbytes = sum(m.nbytes for m in matrices_of(packed))
        rows.append(
            {"weights": weights, "bytes": nbytes, **turns(packed, read, options.rounds, options.threads, options.held)}
        )
    record = {
        "command": measure.command_line("reading", argv), "machine": measure.machine("cpu"),
        "setting": {name: getattr(options, name) for name in ("model", "rounds", "threads", "held")}, "rows": rows,
    }  # fmt: skip
    parts = ("reading", options.model, f"{options.threads}-threads")
    path = measure.record_path(options.out, record["machine"]["device"], *parts)
    measure.save_record(path, record)
    print(table(rows), path, sep="\n")
    return 0
