"""A run that is faulted and resumed until it is finished, and what it must then hold: the bits of an untouched one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .plans import NONE, Event, Plan
from .runs import STEPS, Ended, run

ATTEMPTS = 4  # resumptions without a fault


def _tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of the optimizer and the random states, by where it is."""
    import safetensors.torch

    return safetensors.torch.load_file(folder / "checkpoint" / "training.safetensors")


def finished(folder: Path) -> dict[str, Any]:
    """What a finished run holds, its times left out."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]
    weights = (folder / "checkpoint" / "model.safetensors").read_bytes()
    return {"weights": weights, "training": _tensors(folder), "metrics.jsonl": records}


def differs(run: dict[str, Any], whole: dict[str, Any]) -> str | None:
    """What differs between two finished runs, or None."""
    import torch

    if run["weights"] != whole["weights"]:
        return "checkpoint/model.safetensors differs"
    a, b = run["training"], whole["training"]
    if a.keys() != b.keys():
        return f"the training state has other tensors: {sorted(a.keys() ^ b.keys())[:3]}"
    for name in a:
        if not torch.equal(a[name], b[name]):
            return f"{name} differs"
    if run["metrics.jsonl"] != whole["metrics.jsonl"]:
        wrong = [record for record in run["metrics.jsonl"] if record not in whole["metrics.jsonl"]]
        return f"metrics.jsonl differs: {wrong or 'a line is missing, or out of order'}"
    return None


def left_over(folder: Path) -> list[str]:
    """Temporary files and folders of saves that were killed: ours, and those of safetensors."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if "tmp" in p.name)


def _holds_checkpoint(folder: Path) -> bool:
    return any(p.is_dir() for p in folder.glob("checkpoint-*"))


def _complete(folder: Path, ended: Ended) -> bool:
    log = folder / "metrics.jsonl"
    if ended.status or not log.exists():
        return False
    return any(f'"step": {STEPS},' in line and '"loss"' in line for line in log.read_text().splitlines())


def trial(arguments: list[str], root: Path, plans: list[Plan], whole: dict[str, Any]) -> tuple[str | None, list[Event]]:
    """(what is wrong with a run under these plans, or None; the calls of its first attempt)."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    folder = root / "run"
    begin, go_on = ["train", *arguments, "--out", str(folder)], ["train", "--resume", str(folder)]
    first, ended = None, None
    for plan in [*plans, *[NONE] * ATTEMPTS]:
        ended = run(begin if first is None else go_on, root, plan)
        first = ended.events if first is None else first
        if problem := ended.unclear(plan):
            return f"{plan.do or 'no fault'}: {problem}", first
        if plan is NONE and ended.status == 2:
            if _holds_checkpoint(folder) or "no run to resume" not in ended.text:
                return f"does not go on: {ended.text}", first
            shutil.rmtree(folder, ignore_errors=True)  # killed before there was anything: it starts again
            go_on = begin
        elif go_on is begin:
            go_on = ["train", "--resume", str(folder)]
        if _complete(folder, ended) and plan is NONE:
            break
    else:
        return f"not finished after {ATTEMPTS} resumptions: {ended.text}", first
    if left := left_over(folder):
        return f"left over: {', '.join(left)}", first
    return differs(finished(folder), whole), first
