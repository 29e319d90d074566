"""The matrix products of one training step by each library that can make them, beside one another.

On a GPU cuBLAS and cuBLASLt, between which torch chooses by TORCH_BLAS_PREFER_CUBLASLT or
`torch.backends.cuda.preferred_blas_library`; on a CPU this package's own product and the vendor's, between which
`cpu_policy` chooses. The ways take turns. A sample of each result's rows is held to float64.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.ops import harness
from benchmarks.programs import SIZES
from gpt2_fast.ops.linear_cross_entropy import chunk_rows
from gpt2_fast.ops.runtime.products import product

WAYS = {"cuda": ("cublas", "cublaslt"), "cpu": ("own", "vendor")}
SAMPLE = 16  # rows of a result that are compared


@dataclass(frozen=True)
class Product:
    """[M, K] @ [K, N], `calls` times a step; `left` or `right` read transposed, as the step has them."""

    name: str
    M: int
    K: int
    N: int
    calls: float
    left: bool = False
    right: bool = False

    def operands(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        make = lambda rows, columns, transposed: torch.randn(
            (columns, rows) if transposed else (rows, columns), generator=generator, device=device
        ).to(dtype)
        a, b = make(self.M, self.K, self.left), make(self.K, self.N, self.right)
        return a.t() if self.left else a, b.t() if self.right else b

    @property
    def flops(self) -> int:
        return 2 * self.M * self.K * self.N


def products_of(model: str, batch_size: int, context: int, device: str, itemsize: int) -> list[Product]:
    """The products of a step: each layer's four, forward and for both gradients, and those of a chunk of the head."""
    size, rows = SIZES[model], batch_size * context
    C, V, L = size["n_embd"], size.get("vocab_size", 50257), size["n_layer"]
    layers = {"c_attn": (C, 3 * C), "attn.c_proj": (C, C), "c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    found = []
    for name, (fan_in, fan_out) in layers.items():
        found += [
            Product(name, rows, fan_in, fan_out, L),
            Product(f"{name} dx", rows, fan_out, fan_in, L, right=True),
            Product(f"{name} dW", fan_in, rows, fan_out, L, left=True),
        ]
    chunk = min(rows, chunk_rows(device, V, itemsize, rows))
    calls = rows / chunk
    return [
        *found,
        Product("head", chunk, C, V, calls, right=True),
        Product("head dx", chunk, V, C, calls),
        Product("head dW", V, chunk, C, calls, left=True),
    ]


@contextlib.contextmanager
def _library(way: str) -> Iterator[None]:
    """torch's BLAS library while this lasts; nothing on a CPU, where the way is an argument."""
    if way not in WAYS["cuda"]:
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(way)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def multiply(way: str, a: Tensor, b: Tensor) -> Tensor:
    with _library(way):
        return torch.mm(a, b) if a.is_cuda else product(a, b, impl="cpp" if way == "own" else "aten")


def error(result: Tensor, a: Tensor, b: Tensor) -> float:
    """Of SAMPLE rows, the largest difference from float64 as a part of the largest value."""
    at = torch.linspace(0, len(a) - 1, min(SAMPLE, len(a)), device=a.device).long()
    exact = a[at].double() @ b.double()
    return ((result[at].double() - exact).abs().max() / exact.abs().max()).item()


def measure_product(
    wanted: Product, dtype: torch.dtype, device: str, rounds: int, timer: Callable[[], float] | None = None
) -> dict:
    """By way: seconds of each round, which the ways take in turn, and the error."""
    timer = timer or harness.TIMER
    a, b = wanted.operands(dtype, device)
    found = {}
    for way in WAYS[device]:
        found[way] = {"error": error(multiply(way, a, b), a, b), "seconds": []}
    for _, way in itertools.product(range(rounds), WAYS[device]):
        with _library(way):  # outside of what is timed
            run = torch.mm if a.is_cuda else lambda a, b, way=way: multiply(way, a, b)
            started = timer()
            run(a, b)
            found[way]["seconds"].append(timer() - started)
    return found


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks products", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2", choices=SIZES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="sequences a step (CPU 4, GPU 32)")
    parser.add_argument("--context", type=int, help="tokens a sequence (CPU 256, GPU 1024)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each way (default 9)")
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder for the JSON")
    options = parser.parse_args(argv)
    options.batch_size = options.batch_size or (4 if options.device == "cpu" else 32)
    options.context = options.context or (256 if options.device == "cpu" else 1024)
    if min(options.batch_size, options.context, options.rounds) < 1:
        parser.error("--batch-size, --context and --rounds must be at least 1")
    return options


def table(rows: Sequence[dict], ways: Sequence[str]) -> str:
    """Milliseconds a call by each way, the rate of the faster, and what a step would take with each, and with both."""
    ms = lambda row, way: 1e3 * median(row[way]["seconds"])
    body = [
        [row["product"], f"{row['calls']:.3g}", *(f"{ms(row, way):.4f}" for way in ways),
         f"{row['flops'] / min(ms(row, way) for way in ways) / 1e9:,.2f}",
         *(f"{row[way]['error']:.1e}" for way in ways)]
        for row in rows
    ]  # fmt: skip
    total = lambda cost: f"{sum(row['calls'] * cost(row) for row in rows):.2f}"
    body.append(["a step", "", *(total(lambda row, way=way: ms(row, way)) for way in ways), "", *("" for _ in ways)])
    best = total(lambda row: min(ms(row, way) for way in ways))
    header = ["ms a call", "calls", *ways, "TFLOP/s", *(f"error {way}" for way in ways)]
    return f"{measure.text_table(header, body)}\nthe faster of each: {best} ms a step"


def main(argv: Sequence[str]) -> int:
    options = _arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device is cuda and torch finds no CUDA device; use --device cpu, or see gpt2-fast doctor")
    dtype, rows = getattr(torch, options.dtype), []
    sizes = (options.model, options.batch_size, options.context, options.device, dtype.itemsize)
    for wanted in products_of(*sizes):
        shape = f"{wanted.name} [{wanted.M}, {wanted.K}] @ [{wanted.K}, {wanted.N}]"
        found = measure_product(wanted, dtype, options.device, options.rounds)
        rows.append({"product": shape, "calls": wanted.calls, "flops": wanted.flops, **found})
    setting = {key: getattr(options, key) for key in ("model", "batch_size", "context", "dtype", "rounds")}
    record = {
        "command": measure.command_line("products", argv), "machine": measure.machine(options.device),
        "setting": setting, "rows": rows,
    }  # fmt: skip
    parts = ("products", options.model, options.dtype, f"b{options.batch_size}", f"t{options.context}")
    path = measure.record_path(options.out, record["machine"]["device"], *parts)
    measure.save_record(path, record)
    print(table(rows, WAYS[options.device]), path, sep="\n")
    return 0
