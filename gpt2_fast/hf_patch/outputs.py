"""The output of a patched GPT2LMHeadModel with labels: transformers', but its logits are computed when asked for."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from gpt2_fast.seen import Seen, has_changed, hidden_changed, version_of


class LogitsNotComputedYet:
    """The logits head(hidden), not computed yet. Whoever takes it out of the output for a tensor gets an error."""

    def __init__(self, head: nn.Module, hidden: Tensor, sharded: bool):
        self.head, self.hidden, self.seen = head, hidden, Seen(head, sharded).sampled()
        self.version = version_of(hidden)
        device, self.autocast = hidden.device.type, None  # it may be asked for after autocast's block
        if torch.amp.is_autocast_available(device):  # "meta" has none
            self.autocast = {"device_type": device, "dtype": torch.get_autocast_dtype(device),
                             "enabled": torch.is_autocast_enabled(device)}  # fmt: skip

    def compute(self) -> Tensor:
        self.seen.check("the logits of a patched model")
        if has_changed(self.hidden, self.version):
            raise hidden_changed("the logits of a patched model")
        with self.seen.mode(), torch.autocast(**self.autocast) if self.autocast else contextlib.nullcontext():
            if self.head.weight is self.seen.weight or hasattr(self.head.weight, "device_mesh"):
                return self.head(self.hidden)
            return F.linear(self.hidden, self.seen.weight)  # given for that call alone, or the head has another by now

    def __getattr__(self, name: str):
        raise AttributeError(f"{name}: {TAKEN}")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{getattr(func, '__name__', func)}: {TAKEN}")


TAKEN = (
    "the logits beside a loss of a patched model are computed when they are read, and this is what holds their place; "
    "read output.logits or output['logits'] first"
)


@dataclass
class CausalLMOutput(CausalLMOutputWithCrossAttentions):
    """Reading the loss, as attribute, by name or as [0], computes no logits; everything else that shows them does."""

    @classmethod
    def of(cls, loss: Tensor, head: nn.Module, hidden: Tensor, sharded: bool = False, **others) -> CausalLMOutput:
        output = cls(loss=loss, logits=LogitsNotComputedYet(head, hidden, sharded), **others)
        if sharded:
            output.__class__ = ShardedCausalLMOutput
            if not torch.is_grad_enabled():
                output.logits  # noqa: B018  # the head is whole within this forward alone, and an evaluation reads them
        return output

    @property
    def logits(self) -> Tensor | None:
        logits = self.__dict__.get("logits")
        if isinstance(logits, LogitsNotComputedYet):
            self["logits"] = logits = logits.compute()
        return logits

    @logits.setter
    def logits(self, value) -> None:
        self.__dict__["logits"] = value

    def __getitem__(self, key):
        if key == "loss" or (isinstance(key, int) and key == 0 and next(iter(self), None) == "loss"):
            return self.loss
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self.logits if key == "logits" else super().get(key, default)

    def items(self):
        self.logits  # noqa: B018
        return super().items()

    def values(self):
        self.logits  # noqa: B018
        return super().values()

    def popitem(self, last: bool = True):
        self.logits  # noqa: B018
        return super().popitem(last)


class ShardedCausalLMOutput(CausalLMOutput):
    """Of a model that `fully_shard` was called on, which reads every field of what forward returns, to put hooks on it.

    The logits are no field of it: they would be computed in every step, from a head that is sharded again.
    """


ShardedCausalLMOutput.__dataclass_fields__ = {
    name: field for name, field in CausalLMOutput.__dataclass_fields__.items() if name != "logits"
}
