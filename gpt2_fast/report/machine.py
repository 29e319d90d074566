"""What this machine has: processor, cards and versions, the device of a run, and what products can reach."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from gpt2_fast.kernels import cards
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.cpu_policy import MIN_ROWS, CpuPolicy, cpu_policy

PACKAGES = ("torch", "triton", "transformers", "tiktoken", "safetensors", "numpy")
# Dense TFLOP/s by the makers' data sheets: (bfloat16 with float32 sums, float32 without tensor cores).
# The first name that the device's has as whole words decides, so longer names come first.
CARDS = {
    "B200": (2250.0, 75.0),
    "GH200": (989.4, 66.9),
    "H200 NVL": (835.5, 60.0),
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.4, 51.2),
    "H100 NVL": (835.5, 60.0),
    "H100": (989.4, 66.9),
    "H800": (989.4, 66.9),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "A30": (165.0, 10.3),
    "A40": (149.7, 37.4),
    "RTX A6000": (154.8, 38.7),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090 Ti": (80.0, 40.0),
    "RTX 3090": (71.0, 35.6),
}


def version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # names the build (+cu130), which the metadata need not
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _multiplies_tiles(policy: CpuPolicy) -> bool:
    """Whether bfloat16 alone is multiplied by this package."""
    here = dispatch.unavailable("cpp", "cpu", torch.bfloat16) is None
    return here and not policy.own and policy.takes_own(torch.bfloat16, dispatch.extension().isa())


def environment(device: torch.device) -> dict[str, str]:
    """What the bits of a run depend on, in words: versions, and who computes."""
    found = {"gpt2_fast": version("gpt2_fast"), "torch": torch.__version__.split("+")[0]}
    if device.type == "cuda":
        return found | {"device": torch.cuda.get_device_name(device), "triton": version("triton")}
    policy = cpu_policy()
    products = "gpt2_fast's own products" if policy.own else policy.float32
    if _multiplies_tiles(policy):
        products += ", gpt2_fast's own in bfloat16"
    found["device"] = f"CPU, {products}, bfloat16 {'native' if policy.native_bfloat16 else 'widened'}"
    if not policy.own:  # a vendor's library adds in an order that depends on them
        found["number of threads"] = str(torch.get_num_threads())
    if dispatch.unavailable("cpp", "cpu", torch.float32) is None:
        found["instruction set"] = dispatch.extension().isa()
    return found


def resolve_device(name: str) -> torch.device:
    """The torch device of --device; auto takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}; choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device is {name!r} and torch finds no CUDA device; use --device cpu, or see gpt2-fast doctor"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; choose auto, cpu, cuda or cuda:N")
    return device


def card_peak(device_name: str, dtype: str) -> float | None:
    """FLOPs a second of a card by its maker; None for one that is not in the table, a slice or a laptop's."""
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", device_name):
        return None
    for name, (bfloat16, float32) in CARDS.items():
        if re.search(rf"\b{name}\b", device_name):
            return (bfloat16 if dtype == "bfloat16" else float32) * 1e12
    return None


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of one square product here: the fastest of three after a first, measured once a process."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0), device="cpu").to(device, dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[1:])


def peak(device: torch.device) -> float:
    """FLOPs a second: a card's bfloat16 peak by its maker, or `measured_peak`: of a CPU in float32."""
    if device.type != "cuda":
        return measured_peak(device, torch.float32)
    return card_peak(torch.cuda.get_device_name(device), "bfloat16") or measured_peak(device, torch.bfloat16)


def machine_rows() -> Iterator[tuple[str, str]]:
    policy = cpu_policy()
    yield "system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    yield "processor", f"{cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    yield "versions", ", ".join(f"{name} {version(name)}" for name in ("gpt2_fast", *PACKAGES))
    native = "native" if policy.native_bfloat16 else "widened to float32"
    by = f"own (of {MIN_ROWS} rows or more, else {policy.float32})" if policy.own else policy.float32
    if _multiplies_tiles(policy):
        by += f", own in bfloat16 of {MIN_ROWS} rows or more"
    yield "CPU products", f"{by}; bfloat16 {native} ({policy.reason})"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p, (_, card) = torch.cuda.get_device_properties(index), cards.of_device(index)
            built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
            yield f"GPU {index}", f"{card}, {p.total_memory >> 30} GiB, {built}"
            yield "  Triton kernels", cards.describe(index)
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        yield "GPU", f"none that torch can use (this torch is {built})"


def extension_rows() -> Iterator[tuple[str, str]]:
    reason = dispatch.unavailable("cpp", "cpu", torch.float32)
    if reason is not None:
        yield "extension", reason
        return
    extension = dispatch.extension()
    yield "extension", f"{extension.__file__}"
    yield "built with", f"compiler {extension.COMPILER}; instruction set in use: {extension.isa()}"
    fatbin = Path(extension.__file__).with_name("embedding.fatbin")
    if torch.version.hip is not None:
        yield "CUDA embedding", "not on ROCm: plain PyTorch there"
    elif fatbin.exists():
        yield "CUDA embedding", f"compiled by nvcc when this was built ({fatbin.stat().st_size >> 10} KiB)"
    else:
        yield "CUDA embedding", "no nvcc was found at build time: NVRTC compiles it at first use"
