"""The processes of a run: which device each computes on, and what all of them must have alike."""

from __future__ import annotations

import dataclasses
import os

import torch

from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.parallel.group import Group, check_world, environment_world, join
from gpt2_fast.report.machine import resolve_device
from gpt2_fast.train.config import DTYPES, TrainConfig


def open_group(config: TrainConfig) -> Group:
    """The group that torchrun has started this process in, or a group of one. Raises ValueError, one line.

    Nothing is built or written before it is known that these processes can share a step.
    """
    check_world(environment_world(), config.grad_accum)
    if "TORCHELASTIC_RUN_ID" in os.environ and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun says to several processes: a single one then has their bits
    group = join(config.timeout_minutes)
    group.same(dataclasses.asdict(config), "the processes were started with other options; give all of them the same")
    group.set_limit(config.timeout_minutes)
    return group


def local_device(name: str) -> torch.device:
    """The device of this process: of --device, and with several processes on a machine, each its own GPU."""
    device = resolve_device(name)
    if environment_world() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"--device {name} is one GPU for several processes; use --device cuda: each takes its own")
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"there is no GPU for process {local} of this machine, which has {torch.cuda.device_count()}; "
            "lower --nproc-per-node"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def check_dtype(config: TrainConfig, device: torch.device) -> None:
    """Raises ValueError where the device's kernels do not compute in --dtype; plain PyTorch asked for by name may."""
    if device.type != "cuda" or config.impl == "reference" or dispatch.card_refusal(device.index):
        return  # on a card that is not supported plain PyTorch runs in any dtype
    if dispatch.card_refusal(device.index, getattr(torch, config.dtype)):
        others = " or ".join(f"--dtype {dtype}" for dtype in DTYPES if dtype != config.dtype)
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"--dtype is {config.dtype!r} and {name} has no bfloat16; use {others}, or --impl reference")
