"""What a model with a language-modelling head returns: the loss, and logits that are computed when asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gpt2_fast.modules import is_plain_head
from gpt2_fast.ops.bound import Operations
from gpt2_fast.seen import Seen, has_changed, hidden_changed, version_of


class Head:
    """The head of one forward pass: its weight [V, C] as it was then. sharded: see `seen.Seen`."""

    def __init__(self, lm_head: nn.Module, ops: Operations, sharded: bool = False):
        self.module, self.ops, self.called, self.sharded = lm_head, ops, not is_plain_head(lm_head), sharded
        self.seen = None if self.called else Seen(lm_head, sharded)
        self.weight = None if self.called else lm_head.weight
        self.refused = False

    def refusing(self) -> Head:
        """This head for hidden states that are no longer those of the forward pass: asked for logits, it raises."""
        head = copy.copy(self)
        head.refused = True
        return head

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden [..., C]. Raises RuntimeError where either has changed since the forward pass."""
        if self.refused:
            raise hidden_changed("logits")
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
            self.seen.sampled()  # the logits are computed later, if at all
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
    (DistributedDataParallel, FSDP2, torch.export) find the tensors in it. Copies and pickles hold the logits and
    no head. `.logits` raises RuntimeError where the head or last_hidden_state has changed in place; of an inference
    tensor, which counts no changes, it is not seen.
    """

    loss: Tensor | None
    last_hidden_state: Tensor
    head: Head
    computed_logits: Tensor | None = None

    def __post_init__(self):
        self._version = version_of(self.last_hidden_state)

    @property
    def logits(self) -> Tensor:
        if self.computed_logits is None:
            self.computed_logits = self._current_head().logits(self.last_hidden_state)
        return self.computed_logits

    def _current_head(self) -> Head:
        """The head, or one that refuses where the hidden states have changed: a rebuilt output counts from there."""
        changed = self.computed_logits is None and has_changed(self.last_hidden_state, self._version)
        return self.head.refusing() if changed else self.head

    def __getstate__(self) -> dict:
        return self.__dict__ | {"computed_logits": self.logits, "head": None}

    def __iter__(self):
        return iter((self.logits,) if self.loss is None else (self.loss, self.logits))

    def __getitem__(self, index):
        if index == 0 and self.loss is not None:
            return self.loss
        return getattr(self, index) if isinstance(index, str) else tuple(self)[index]


pytree.register_pytree_node(
    CausalLMOutput,
    lambda output: ([output.loss, output.last_hidden_state, output.computed_logits], output._current_head()),
    lambda tensors, head: CausalLMOutput(tensors[0], tensors[1], head, tensors[2]),
    serialized_type_name="gpt2_fast.CausalLMOutput",
    to_dumpable_context=lambda head: None,
    from_dumpable_context=lambda context: None,
)
