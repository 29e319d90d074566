"""torch.compile beside DDP and FSDP2, of one layer for its time."""

from __future__ import annotations

import functools

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from .setting import build, build_nanogpt, case, run, sharded

build_one_layer = functools.partial(build, n_layer=1)
build_nanogpts_layer = functools.partial(build_nanogpt, n_layer=1)


@case("compile")
def compiled_inside_ddp():
    return run(DDP(torch.compile(build_one_layer(), backend="aot_eager")), make=build_one_layer)


@case("compile")
def compiled_around_ddp():
    return run(torch.compile(DDP(build_one_layer()), backend="aot_eager"), make=build_one_layer)


@case("compile")
def compiled_nanogpt_in_ddp():
    """As nanoGPT's train.py does: first compiled, then wrapped."""
    return run(DDP(torch.compile(build_nanogpts_layer(), backend="aot_eager")), make=build_nanogpts_layer)


@case("compile")
def compiled_blocks_in_fsdp():
    model = build_one_layer()
    for block in model.transformer.h:
        block.compile(backend="aot_eager")
    return run(sharded(model), make=build_one_layer)
