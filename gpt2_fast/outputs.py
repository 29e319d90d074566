"""What a model with a language-modelling head returns: the loss, and logits that are computed when asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gpt2_fast.modules import Seen, is_plain_head
from gpt2_fast.ops.bound import Operations


class Head:
    """The head of one forward pass: its weight [V, C] as it was then. sharded: see `modules.Seen`."""

    def __init__(self, lm_head: nn.Module, ops: Operations, sharded: bool = False):
        self.module, self.ops, self.called, self.sharded = lm_head, ops, not is_plain_head(lm_head), sharded
        self.seen = None if self.called else Seen(lm_head, sharded)
        self.weight = None if self.called else lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden [..., C]. Raises RuntimeError where the head has changed since the forward pass."""
        if self.called:
            return self.module(hidden)
        self.seen.check("logits")
        with self.seen.mode():
            # Under autocast the hidden states are of its dtype, and may outlive its block.
            return self.ops.linear(hidden, self.weight.to(hidden.dtype).t())

    def logits_beside_loss(self, hidden: Tensor) -> Tensor | None:
        """The logits of a sharded model without gradients, for a validation that reads them; else they can wait."""
        return self.logits(hidden) if self.sharded and not torch.is_grad_enabled() else None

    def loss(self, hidden: Tensor, targets: Tensor, num_items: Tensor | int | None, ignore_index: int = -100) -> Tensor:
        """The mean cross-entropy, float32, of the targets that are not ignored; or their sum divided by num_items."""
        if not self.called:
            return self.ops.linear_cross_entropy(
                hidden, self.weight, targets, num_items=num_items, ignore_index=ignore_index
            )
        logits = self.module(hidden).flatten(0, -2).float()
        if num_items is None:
            return F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="sum") / num_items


@dataclass(eq=False)
class CausalLMOutput:
    """`.loss` (float32 scalar, or None without labels) and `.logits` [B, T, V], computed when first asked for.

    Unpacks and indexes as transformers' output does: (loss, logits) with labels, (logits,) without. torch's walkers
    (DistributedDataParallel, FSDP2, torch.export) find the tensors in it.
    """

    loss: Tensor | None
    last_hidden_state: Tensor
    head: Head
    computed_logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        if self.computed_logits is None:
            self.computed_logits = self.head.logits(self.last_hidden_state)
        return self.computed_logits

    def __iter__(self):
        return iter((self.logits,) if self.loss is None else (self.loss, self.logits))

    def __getitem__(self, index):
        if index == 0 and self.loss is not None:
            return self.loss
        return getattr(self, index) if isinstance(index, str) else tuple(self)[index]


pytree.register_pytree_node(
    CausalLMOutput,
    lambda output: ([output.loss, output.last_hidden_state, output.computed_logits], output.head),
    lambda tensors, head: CausalLMOutput(tensors[0], tensors[1], head, tensors[2]),
    serialized_type_name="gpt2_fast.CausalLMOutput",
    to_dumpable_context=lambda head: None,
    from_dumpable_context=lambda context: None,
)
