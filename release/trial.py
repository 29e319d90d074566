"""What a wheel is tried by, the text of `python -c` in an empty folder: imported as installed, trained for three steps.

Its last line is JSON: Python, torch, the C library, the compiler and instruction set, the OpenMP runtime, the losses.
"""

import json
import pathlib
import platform
import re
import sys
import warnings

import torch

from gpt2_fast.cli import main
from gpt2_fast.ops import rooms
from gpt2_fast.ops.runtime import dispatch

warnings.simplefilter("error", RuntimeWarning)  # the package's own: without its extension, or one of other sources
extension = pathlib.Path(dispatch.extension().__file__)
assert extension.name == "_C.abi3.so", extension
assert extension.with_name("cuda_src").is_dir(), "the CUDA source is not installed"
rooms()  # each fills its row of the table
chosen = {op: dispatch.explain(op, torch.device("cpu"), torch.float32)[0] for op in dispatch.TABLE}
assert "reference" not in chosen.values(), chosen

flags = pathlib.Path("/proc/cpuinfo").read_text().split()
wanted = {
    "amx_bf16": "amx", "avx512_bf16": "avx512bf16", "avx512_vnni": "avx512vnni", "avx512f": "avx512",
    "avx_vnni": "avxvnni", "avx2": "avx2",
}  # fmt: skip
wanted = wanted if platform.machine() == "x86_64" else {}
widest = next((isa for flag, isa in wanted.items() if flag in flags), "baseline")
assert dispatch.extension().isa() == widest, f"{dispatch.extension().isa()} was chosen, this processor has {widest}"

pathlib.Path("text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(4000)))
options = "--model nano --data text.txt --steps 3 --warmup 1 --lr 1e-3 --context 64 --batch-size 4 --eval-batches 1"
if status := main(["train", *options.split(), "--device", "cpu", "--out", "run"]):
    sys.exit(status)
steps = [json.loads(line) for line in pathlib.Path("run/metrics.jsonl").read_text().splitlines()]
losses = [step["loss"] for step in steps if "loss" in step]
assert len(losses) == 3, steps
assert losses[2] < losses[0], losses

maps = pathlib.Path("/proc/self/maps").read_text()
openmp = sorted({line.split()[-1] for line in maps.splitlines() if re.search(r"lib(gomp|iomp|omp)[^/]*$", line)})
assert len(openmp) == 1, f"{len(openmp)} OpenMP runtimes in one process: {openmp}"
found = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "libc": " ".join(platform.libc_ver()),
    "machine": platform.machine(),
    "compiler": dispatch.extension().COMPILER,
    "isa": dispatch.extension().isa(),
    "fatbin": extension.with_name("embedding.fatbin").exists(),
    "openmp": openmp[0].rpartition("site-packages/")[2],
    "losses": losses,
}
print(json.dumps(found))
