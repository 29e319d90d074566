"""`gpt2-fast doctor`: what runs on this machine and why; what `patch` takes over; the Triton kernels' machine code.

The last needs no GPU: Triton compiles for one that is not there, and the report is read from the code.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from gpt2_fast.config import GPT2Config
from gpt2_fast.kernels import cards
from gpt2_fast.ops import rooms
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.report.machine import extension_rows, machine_rows, version


def report() -> None:
    """Prints machine, versions, the extension, and op by op the implementation chosen and why."""
    rows = [*machine_rows(), *extension_rows()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    for device_type in devices:
        print(f"\nimpl='auto' on {device_type} takes")
        for op in rooms():
            if dispatch.implementations(op, device_type)[0] == "reference":
                continue  # another device's alone
            found = [
                dispatch.explain(op, torch.device(device_type), dtype) for dtype in (torch.float32, torch.bfloat16)
            ]
            for (chosen, passed), form in zip(found[: 1 + (found[0] != found[1])], ("", " in bfloat16"), strict=False):
                print(f"  {op:<22} {chosen}{form}")
                for name, reason in passed:
                    print(f"  {'':<22}   not {name}: {reason}")
    if not torch.cuda.is_available():
        print("\non a GPU it would take")
        for op, by_device in dispatch.TABLE.items():
            first = by_device.get("cuda", ("reference",))[0]
            if first == "reference":
                continue
            reason = dispatch.unavailable(first, "cuda", torch.float32)
            print(f"  {op:<22} {first}" + (f"   (not here: {reason})" if reason else ""))


CALLS = """call by call on transformers' own path:
  attention: output_attentions, head_mask, attention masks of four dimensions, encoder_hidden_states, several tokens on
             top of a cache, static caches, one token with gradients on top of a cache
  embedding: inputs_embeds, a past, output_hidden_states
  loss:      torch.compile, return_dict=False, logits_to_keep, another loss_function"""


def explain_patch(model: torch.nn.Module) -> str:
    """What runs where in a model that `gpt2_fast.patch` took, and why: a table, equal blocks in one line."""
    from gpt2_fast.hf_patch import swap

    blocks: dict[tuple, list[int]] = {}
    for row in swap.explain(model):
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
    from gpt2_fast.hf_patch import swap

    if Path(name).is_dir() and not (path := Path(name) / "config.json").is_file():
        GPT2Config.from_json(path)  # raises, and says where a run has one
    try:
        config = importlib.import_module("transformers").AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no config that transformers reads: {str(error).splitlines()[0]}") from None
    if config.model_type != "gpt2":
        raise ValueError(f"{name} is a model of type {config.model_type}; gpt2_fast.patch takes gpt2")
    with torch.device("meta"):
        model = importlib.import_module("transformers").GPT2LMHeadModel(config)
    return explain_patch(swap.patch(model))


def check_kernels(archs: tuple[cards.Name, ...] = tuple(cards.ARCHS), quick: bool = False) -> int:
    """Compiles every configuration of every Triton kernel for each of `archs` and prints what the code needs.

    quick: one configuration of each kernel, not every one.

    Returns the number of failures: what does not compile, spills registers, exceeds the target's shared memory, or
    waits for each of its tensor-core products.
    """
    if missing := dispatch.triton_missing():
        print(missing)
        return 1
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces kernels by Python: nothing to compile
    from gpt2_fast.kernels import aot, shipped

    jobs = shipped.jobs(archs, quick)
    print(
        f"{'kernel':<64} {'target':<7} {'registers':>9} {'spilled':>7} {'shared':>7}  tensor-core instructions; "
        "instructions:products:waits:copies of each main loop",
    )
    failures: Counter = Counter()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for name, arch, result, error in pool.map(shipped.report, jobs, chunksize=4):
            found = [error] if result is None else aot.problems(result)
            failures[arch] += bool(found)
            line = f"{name:<64} {cards.label(arch):<7} "
            if result is not None:
                mma = ", ".join(f"{k} {v}" for k, v in sorted(result["mma"].items())) or "none"
                loops = (f"{x.instructions}:{x.products}:{x.waits}:{x.copies}" for x in result["loops"])
                mma = "; ".join([mma, *filter(None, [" ".join(loops)])])
                line += f"{result['registers']:>9} {result['spilled_bytes']:>7} {result['shared_bytes']:>7}  {mma}"
            print(line + (f"  FAILED: {'; '.join(found)}" if found else ""), flush=True)
    compiled = Counter(job.arch for job in jobs)
    print()
    for arch in archs:
        row = cards.ARCHS[arch]
        half = "" if row.bfloat16 else ", float32 and float16"
        print(f"{cards.label(arch):<7} {row.cards}{half}: {compiled[arch]} compiled, {failures[arch]} failed; "
              f"the kernels {cards.history(arch)}")  # fmt: skip
    print(f"{len(jobs)} compilations, {failures.total()} failed; triton {version('triton')}")
    return failures.total()
