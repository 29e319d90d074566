"""A patched transformers model under accelerate and Trainer."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel as DDP

from gpt2_fast import AdamW
from gpt2_fast.hf_patch import swap

from . import setting
from .own import refuses
from .refused import tied_head_of_two_parameters
from .setting import (
    CLIP,
    EPS,
    LR,
    STEPS,
    B,
    T,
    V,
    apart,
    batches,
    case,
    farthest,
    mean,
    mine,
    optimizer_of,
    sharded,
    whole,
)


def build_hf():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=48, n_head=3, vocab_size=V, n_positions=T, embd_pdrop=0.0,
                                     attn_pdrop=0.0, resid_pdrop=0.0, use_cache=False)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Texts(torch.utils.data.Dataset):
    """STEPS batches of B texts of unequal lengths; the labels leave the padding out."""

    def __init__(self):
        self.ids = batches().flatten(0, 1)
        self.lengths = torch.randint(4, T + 1, (len(self.ids),), generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        mask = (torch.arange(T) < self.lengths[i]).long()
        return {"input_ids": self.ids[i], "attention_mask": mask, "labels": self.ids[i].masked_fill(mask == 0, -100)}


@functools.lru_cache
def alone_hf(counts_first: bool = False):
    """As `alone`: transformers' own model and torch's optimizer, one process, and logits of the first rows after it.

    counts_first: divide the loss by all labels as Trainer does, the first of each text among them, which is not scored.
    """
    model = build_hf()
    begin = [whole(p).clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=0.0)
    losses, norms = [], []
    for batch in torch.utils.data.DataLoader(Texts(), batch_size=B):
        optimizer.zero_grad()
        count = (batch["labels"] != -100).sum() if counts_first else None
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    batch = next(iter(torch.utils.data.DataLoader(Texts(), batch_size=B)))
    with torch.no_grad():
        logits = model.eval()(**batch).logits[batch["attention_mask"].bool()]
    return losses, norms, [whole(p) for p in model.parameters()], logits, begin


def _fsdp_plugin():
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["GPT2Block"],
        reshard_after_forward=True, cpu_ram_efficient_loading=False,
    )  # fmt: skip


def _shard_on_the_cpu(plugin) -> None:
    """accelerate shards on GPUs alone and takes DDP on a CPU, plugin or not; nothing in its FSDP2 needs a GPU."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _accelerate(plugin=None, optimizer_class=torch.optim.AdamW, **options):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    import gpt2_fast

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    if plugin is not None:
        _shard_on_the_cpu(plugin)
    model = gpt2_fast.patch(build_hf())
    assert all(row.runs != "transformers" for row in swap.explain(model))
    optimizer = optimizer_class(model.parameters(), lr=LR, eps=EPS, weight_decay=0.0, **options)
    loader = torch.utils.data.DataLoader(Texts(), batch_size=B // 2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert isinstance(model, DDP if plugin is None else FSDPModule)
    losses, norms = [], []
    for batch in loader:
        optimizer.zero_grad()
        scored = (batch["labels"][:, 1:] != -100).sum()
        everyone = accelerator.reduce(scored.clone())
        # Gradients are averaged over the ranks; divided by all labels, they are to be summed.
        loss = model(**batch, num_items_in_batch=everyone).loss * accelerator.num_processes
        accelerator.backward(loss)
        losses.append(mean(loss))
        if "clip_grad_norm" not in options:
            norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
            norms.append(whole(norm).item())
        optimizer.step()
        if "clip_grad_norm" in options:
            norms.append(optimizer.optimizer.last_grad_norm.item())
    expected = alone_hf()
    found = apart(losses, norms, [whole(p) for p in model.parameters()], expected)
    batch = next(iter(torch.utils.data.DataLoader(Texts(), batch_size=B)))
    model.eval()
    with torch.no_grad():
        found["logits"] = farthest(model(**batch).logits[batch["attention_mask"].bool()], expected[3])
    inner = accelerator.unwrap_model(model)
    assert inner.lm_head.weight is inner.transformer.wte.weight
    return found


@case("accelerate")
def accelerate_ddp():
    return _accelerate()


@case("accelerate")
def accelerate_ddp_with_our_optimizer():
    return _accelerate(None, AdamW, clip_grad_norm=CLIP)


@case("accelerate")
def accelerate_fsdp():
    return _accelerate(_fsdp_plugin())


@case("accelerate")
def accelerate_fsdp_with_our_optimizer():
    return _accelerate(_fsdp_plugin(), AdamW, clip_grad_norm=CLIP)


@case("accelerate")
def patched_fsdp():
    """`fully_shard` by hand: the head is read by the fused loss within forward, and never when it is sharded."""
    import gpt2_fast

    model = sharded(gpt2_fast.patch(build_hf()), reshard_after_forward=True)
    with pytest.raises(ValueError, match="call gpt2_fast.patch before fully_shard"):
        gpt2_fast.patch(model)
    optimizer = optimizer_of(model, weight_decay=0.0)
    losses, norms, expected = [], [], alone_hf()
    for batch in torch.utils.data.DataLoader(Texts(), batch_size=B):
        optimizer.zero_grad()
        count = (batch["labels"][:, 1:] != -100).sum()
        output = model(**{name: mine(t) for name, t in batch.items()}, num_items_in_batch=count)
        refuses(output, "the head is sharded again")
        loss = output.loss * 2  # a rank's labels over all: FSDP2 averages, and they are to be summed
        loss.backward()
        optimizer.step()
        losses.append(mean(loss))
        norms.append(optimizer.last_grad_norm.item())
    found = apart(losses, norms, [whole(p) for p in model.parameters()], expected)
    batch = next(iter(torch.utils.data.DataLoader(Texts(), batch_size=B)))
    with torch.no_grad():
        found["logits"] = farthest(model(**batch).logits[batch["attention_mask"].bool()], expected[3])
    return found


@case("accelerate")
def a_tied_head_of_two_parameters_patched():
    return tied_head_of_two_parameters(_build_patched)


def _build_patched():
    import gpt2_fast

    return gpt2_fast.patch(build_hf())


def _trainer(**options):
    import transformers
    from accelerate.state import AcceleratorState, GradientState

    import gpt2_fast

    AcceleratorState._reset_state(True)
    GradientState._reset_state()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if options.get("fsdp"):
                _shard_on_the_cpu(_fsdp_plugin())
                self.is_fsdp_enabled = True

    arguments = transformers.TrainingArguments(
        output_dir=str(setting.folder), per_device_train_batch_size=B // 2, per_device_eval_batch_size=B // 2,
        max_steps=STEPS, learning_rate=LR, adam_epsilon=EPS, weight_decay=0.0, max_grad_norm=CLIP,
        lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, ddp_backend="gloo", **options,
    )  # fmt: skip
    model = gpt2_fast.patch(build_hf())
    trainer = InOrder(model=model, args=arguments, train_dataset=Texts())
    trainer.train()
    assert isinstance(trainer.model_wrapped, FSDPModule if "fsdp" in options else DDP)
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    losses, norms = ([float(entry[name]) for entry in history] for name in ("loss", "grad_norm"))
    expected = alone_hf(counts_first=True)
    found = apart(losses, norms, [whole(p) for p in trainer.model_wrapped.parameters()], expected)
    texts = torch.utils.data.Subset(Texts(), range(B))
    predictions = torch.tensor(trainer.predict(texts).predictions)
    mask = torch.stack([text["attention_mask"] for text in texts]).bool()
    found["logits"] = farthest(predictions[mask], expected[3])
    return found


@case("trainer")
def trainer_ddp():
    return _trainer()


@case("trainer")
def trainer_ddp_recompute():
    return _trainer(gradient_checkpointing=True)


@case("trainer")
def trainer_fsdp():
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"], "reshard_after_forward": True}
    return _trainer(fsdp=True, fsdp_config=config)
