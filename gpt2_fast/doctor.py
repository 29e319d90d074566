"""`gpt2-fast doctor`: what this machine has, what runs on it and why; and the Triton kernels' machine code.

The second half needs no GPU: Triton compiles for one that is not there, and the report is read from the code.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.cpu_policy import MIN_ROWS, cpu_policy

PACKAGES = ("torch", "triton", "transformers", "tiktoken", "safetensors", "numpy")


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


def _machine() -> Iterator[tuple[str, str]]:
    policy = cpu_policy()
    yield "system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    yield "processor", f"{cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    yield "versions", ", ".join(f"{name} {version(name)}" for name in ("gpt2_fast", *PACKAGES))
    native = "native" if policy.native_bfloat16 else "widened to float32"
    by = f"own (of {MIN_ROWS} rows or more, else {policy.float32})" if policy.own else policy.float32
    yield "CPU products", f"{by}, bfloat16 {native} ({policy.reason})"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            yield (
                f"GPU {index}",
                f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB, CUDA {torch.version.cuda}",
            )
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        yield "GPU", f"none that torch can use (this torch is {built})"


def _extension() -> Iterator[tuple[str, str]]:
    reason = dispatch.unavailable("cpp", "cpu", torch.float32)
    if reason is not None:
        yield "extension", reason
        return
    extension = dispatch.extension()
    yield "extension", f"{extension.__file__}"
    yield "built with", f"compiler {extension.COMPILER}; instruction set in use: {extension.isa()}"
    fatbin = Path(extension.__file__).with_name("embedding.fatbin")
    if fatbin.exists():
        yield "CUDA embedding", f"compiled by nvcc when this was built ({fatbin.stat().st_size >> 10} KiB)"
    else:
        yield "CUDA embedding", "no nvcc was found at build time: NVRTC compiles it at first use"


def report() -> None:
    """Prints machine, versions, the extension, and op by op the implementation chosen and why."""
    rows = [*_machine(), *_extension()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    for device_type in devices:
        print(f"\nimpl='auto' on {device_type} takes")
        for op in dispatch.TABLE:
            for dtype in (torch.float32, torch.bfloat16):
                chosen, passed = dispatch.explain(op, torch.device(device_type), dtype)
                if dtype == torch.bfloat16 and not passed:
                    continue
                print(f"  {op:<22} {chosen}")
                for name, reason in passed:
                    print(f"  {'':<22}   not {name}: {reason}")
    if not torch.cuda.is_available():
        print("\non a GPU it would take")
        for op, by_device in dispatch.TABLE.items():
            first = by_device["cuda"][0]
            reason = dispatch.unavailable(first, "cuda", torch.float32)
            print(f"  {op:<22} {first}" + (f"   (not here: {reason})" if reason else ""))


# ---- patched models ----

CALLS = """call by call on transformers' own path:
  attention: output_attentions, head_mask, attention masks of four dimensions, encoder_hidden_states, several tokens on
             top of a cache, static caches, one token with gradients on top of a cache
  embedding: inputs_embeds, a past, output_hidden_states
  loss:      torch.compile, return_dict=False, logits_to_keep, another loss_function"""


def explain_patch(model: torch.nn.Module) -> str:
    """What runs where in a model that `gpt2_fast.patch` took, and why: a table, equal blocks in one line."""
    from gpt2_fast import patching

    blocks: dict[tuple, list[int]] = {}
    for row in patching.explain(model):
        before, found, after = re.match(r"(.*?\.h)\.(\d+)(.*)|(.*)", row.module).group(1, 2, 3)
        key = (row.module, None, *row[1:]) if found is None else (before, after, *row[1:])
        blocks.setdefault(key, []).append(int(found or 0))
    lines = []
    for (name, after, part, runs, why), indices in blocks.items():
        if after is not None:
            name = f"{name}.{indices[0]}{f'-{indices[-1]}' if len(indices) > 1 else ''}{after}"
        lines.append(f"{name:<30} {part:<26} {f'{runs}   ({why})' if why else _with_implementations(runs, model)}")
    return "\n".join([*lines, "", CALLS])


def _with_implementations(ops: str, model: torch.nn.Module) -> str:
    """Ops, each with what it takes for the model's device and dtype; a model without memory counts as on the CPU."""
    weight = next(model.parameters())
    device = torch.device("cpu") if weight.is_meta else weight.device
    return ", ".join(f"{op} ({dispatch.explain(op, device, weight.dtype)[0]})" for op in ops.split(", "))


def explain_patch_of(name: str) -> str:
    """`explain_patch` of the GPT2LMHeadModel of a checkpoint folder or hub repository, from its config alone."""
    from gpt2_fast import patching

    try:
        config = importlib.import_module("transformers").AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no config that transformers reads: {str(error).splitlines()[0]}") from None
    if config.model_type != "gpt2":
        raise ValueError(f"{name} is a model of type {config.model_type}; gpt2_fast.patch takes gpt2")
    with torch.device("meta"):
        model = importlib.import_module("transformers").GPT2LMHeadModel(config)
    return explain_patch(patching.patch(model))


# ---- the kernels ----

ARCHS = (80, 90, 100)


def check_kernels(archs: tuple[int, ...] = ARCHS, quick: bool = False) -> int:
    """Compiles every configuration of every Triton kernel for each of `archs` and prints what the code needs.

    quick: one configuration of each kernel, not every one.

    Returns the number of failures: what does not compile, spills registers, or exceeds the target's shared memory.
    """
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed; run: pip install triton")
        return 1
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces kernels by Python: nothing to compile
    from gpt2_fast.kernels import aot, shipped

    jobs = shipped.jobs(archs, quick)
    print(
        f"{'kernel':<64} {'target':<7} {'registers':>9} {'spilled':>7} {'shared':>7}  tensor-core instructions",
    )
    failures = 0
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for name, arch, result, error in pool.map(shipped.report, jobs, chunksize=4):
            found = [error] if result is None else aot.problems(result)
            failures += bool(found)
            line = f"{name:<64} sm_{arch:<4} "
            if result is not None:
                mma = ", ".join(f"{k} {v}" for k, v in sorted(result["mma"].items())) or "none"
                line += f"{result['registers']:>9} {result['spilled_bytes']:>7} {result['shared_bytes']:>7}  {mma}"
            print(line + (f"  FAILED: {'; '.join(found)}" if found else ""), flush=True)
    print(f"\n{len(jobs)} compilations, {failures} failed; triton {version('triton')}")
    return failures
