"""A training script in the manner of nanoGPT's train.py, on the CPU: `nanogpt_loop.py FOLDER`, or under torchrun.

What it has of train.py is what matters to a model under DDP: gradients are accumulated by setting
require_backward_grad_sync, rank 0 alone evaluates, through the wrapped model, and writes ckpt.pt. Micro-batches are
drawn by their number, so that any number of processes shares the same ones.
"""

import datetime
import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed import all_reduce, destroy_process_group, get_rank, get_world_size, init_process_group
from torch.nn.parallel import DistributedDataParallel

from gpt2_fast.nanogpt import GPT, GPTConfig

STEPS, MICRO, BATCH, BLOCK, VOCAB = 4, 4, 2, 16, 61


def micro_batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCAB, (BATCH, BLOCK + 1), generator=torch.Generator().manual_seed(number))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def train(folder: Path, bias: bool, ddp: bool) -> None:
    rank, world = (get_rank(), get_world_size()) if ddp else (0, 1)
    mine = MICRO // world
    torch.manual_seed(1337)
    raw = GPT(GPTConfig(block_size=BLOCK, vocab_size=VOCAB, n_layer=2, n_head=3, n_embd=48, dropout=0.0, bias=bias))
    optimizer = raw.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    for group in optimizer.param_groups:
        group["eps"] = 1e-6  # see tests/distributed_loops/setting.py
    model = DistributedDataParallel(raw) if ddp else raw
    losses, validations = [], []
    for step in range(STEPS):
        if rank == 0:
            model.eval()
            with torch.no_grad():
                validations.append([model(*micro_batch(10_000 + i))[1].item() for i in range(3)])
            model.train()
        total = torch.zeros(())
        for i in range(mine):
            if ddp:
                model.require_backward_grad_sync = i == mine - 1
            _, loss = model(*micro_batch(step * MICRO + rank * mine + i))
            (loss / mine).backward()
            total += loss.detach() / MICRO
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ddp:
            all_reduce(total)
        losses.append(total.item())
    if rank == 0:
        torch.save({"model": raw.state_dict(), "optimizer": optimizer.state_dict()}, folder / "ckpt.pt")
    found = {"losses": losses, "validations": validations, "weights": [p.sum().item() for p in raw.parameters()]}
    (folder / f"{rank}.json").write_text(json.dumps(found))


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    torch.set_num_threads(1)
    ddp = "RANK" in os.environ
    if ddp:
        init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name, bias in (("bias", True), ("none", False)):
        (folder / name).mkdir(exist_ok=True)
        train(folder / name, bias, ddp)
    if ddp:
        destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
