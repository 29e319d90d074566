"""transformers' GPT-2 classes on this package's operations, and which class of its is which of these.

Each is a subclass of transformers' class of the same name, so a saved folder names transformers' class and loads
anywhere. What is made of one is patched when it is made; `gpt2_fast.patch` gives an existing module the same class.

A class of somebody else's made from one of transformers' gets its own: (theirs, the one here), so that their forward
runs where they have one, and `super().forward` is the one here.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn
from transformers import modeling_utils
from transformers.models.gpt2 import modeling_gpt2

from gpt2_fast.hf_patch.modules import BlockForward, LMForward, ModelForward, own_forward


class Patched:
    """Patches what it holds when it is made."""

    def __init__(self, config, *inputs: Any, **kwargs: Any):
        super().__init__(config, *inputs, **kwargs)
        swap(self)


class GPT2Block(BlockForward, modeling_gpt2.GPT2Block):
    """A block on fused operations."""


class GPT2Model(Patched, ModelForward, modeling_gpt2.GPT2Model):
    """transformers' GPT2Model on fused operations."""


class GPT2LMHeadModel(Patched, LMForward, modeling_gpt2.GPT2LMHeadModel):
    """transformers' GPT2LMHeadModel on fused operations; with labels, logits are computed when they are read."""


class GPT2DoubleHeadsModel(Patched, modeling_gpt2.GPT2DoubleHeadsModel):
    """transformers' GPT2DoubleHeadsModel around a GPT2Model on fused operations."""


class GPT2ForSequenceClassification(Patched, modeling_gpt2.GPT2ForSequenceClassification):
    """transformers' GPT2ForSequenceClassification around a GPT2Model on fused operations."""


class GPT2ForTokenClassification(Patched, modeling_gpt2.GPT2ForTokenClassification):
    """transformers' GPT2ForTokenClassification around a GPT2Model on fused operations."""


class GPT2ForQuestionAnswering(Patched, modeling_gpt2.GPT2ForQuestionAnswering):
    """transformers' GPT2ForQuestionAnswering around a GPT2Model on fused operations."""


_CLASSES = (
    GPT2Block, GPT2Model, GPT2LMHeadModel, GPT2DoubleHeadsModel, GPT2ForSequenceClassification,
    GPT2ForTokenClassification, GPT2ForQuestionAnswering,
)  # fmt: skip
PATCHED: dict[type, type] = {getattr(modeling_gpt2, cls.__name__): cls for cls in _CLASSES}
ORIGINAL: dict[type, type] = {patched: original for original, patched in PATCHED.items()}


def _remember_outputs(cls: type) -> None:
    """transformers 5 looks up by class what a model can record; it enters a class when it makes one."""
    registry = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", None)
    if registry is not None and hasattr(cls, "_can_record_outputs"):
        dict.__setitem__(registry, str(cls), cls._can_record_outputs)


for _cls in _CLASSES:
    _remember_outputs(_cls)


def _new(original: type) -> nn.Module:
    patched = patched_class(original)
    return patched.__new__(patched)


def _reduce(self, protocol: int) -> tuple:
    """A class made here has no name to be found by: a copy and a file name the class that it was made from."""
    getstate = getattr(type(self), "__getstate__", None)
    theirs = getstate is not None and getstate is not getattr(object, "__getstate__", None)  # object has one since 3.11
    return _new, (original_class(type(self)),), self.__getstate__() if theirs else self.__dict__


@functools.cache
def patched_class(cls: type) -> type | None:
    """What `patch` makes of a module of class `cls`; None where that is no GPT-2 class of transformers', or done.

    Raises TypeError, one line, for a class that refuses a subclass.
    """
    if cls in PATCHED:
        return PATCHED[cls]
    base = next((base for base in cls.__mro__ if base in PATCHED or base in ORIGINAL), None)
    if base is None or base in ORIGINAL or issubclass(cls, tuple(ORIGINAL)):
        return None
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
             "_gpt2_fast_original": cls, "__reduce_ex__": _reduce}  # fmt: skip
    if own_forward(cls) is own_forward(base):  # found by name before the one here, where transformers wraps it
        names["forward"] = PATCHED[base].forward
    try:
        made = types.new_class(cls.__name__, (cls, PATCHED[base]), exec_body=lambda body: body.update(names))
    except TypeError as error:
        raise TypeError(f"gpt2_fast.patch: {cls.__module__}.{cls.__qualname__} takes no subclass: {error}") from None
    _remember_outputs(made)
    return made


def original_class(cls: type) -> type | None:
    """The class that a module had before `patch`; None where it has no patched one.

    Raises ValueError, one line, for a class that somebody made from one of this module.
    """
    if cls in ORIGINAL:
        return ORIGINAL[cls]
    if "_gpt2_fast_original" in cls.__dict__:
        return cls.__dict__["_gpt2_fast_original"]
    if issubclass(cls, tuple(ORIGINAL)):
        raise ValueError(
            f"gpt2_fast.unpatch: {cls.__module__}.{cls.__qualname__} is made from a class of gpt2_fast.hf and has no "
            "other to go back to; make it from transformers' class"
        )
    return None


def swap(model: nn.Module) -> None:
    """Gives every module of `model` its patched class."""
    for module, cls in [(module, patched_class(type(module))) for module in model.modules()]:
        if cls is not None:
            module.__class__ = cls


def swap_back(model: nn.Module) -> None:
    """Gives every module of `model` the class that it had."""
    for module, cls in [(module, original_class(type(module))) for module in model.modules()]:
        if cls is not None:
            module.__class__ = cls
