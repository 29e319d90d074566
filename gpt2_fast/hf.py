"""transformers' own GPT-2 classes on this package's operations.

from gpt2_fast.hf import GPT2LMHeadModel

model = GPT2LMHeadModel.from_pretrained("gpt2")  # a PreTrainedModel: Trainer, pipeline, PEFT and generate know it

Every class of transformers whose name begins with GPT2 is here. The models are subclasses of transformers' and are
patched when they are made, as by `gpt2_fast.patch`; configs, tokenizers and GPT2PreTrainedModel are transformers' own.
A saved folder names transformers' classes, so it loads anywhere.

State of the process: which class transformers' Auto classes give for a GPT2Config, see `register`.
"""

from __future__ import annotations

from typing import Any

try:
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.gpt2 import modeling_gpt2
except ImportError as error:
    raise ImportError(f"gpt2_fast.hf needs transformers; run: pip install transformers ({error})") from None

from gpt2_fast.hf_patch.classes import (
    ORIGINAL,
    PATCHED,
    GPT2Block,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

__all__ = [
    "GPT2Block", "GPT2DoubleHeadsModel", "GPT2ForQuestionAnswering", "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification", "GPT2LMHeadModel", "GPT2Model", "register", "unregister",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What is no model, and so transformers' own: GPT2Config, GPT2PreTrainedModel, tokenizers."""
    if name.startswith("GPT2"):
        for module in (transformers, modeling_gpt2):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _give(classes: dict[type, type]) -> None:
    """Lets every Auto class give classes[cls] where it gives cls."""
    config = transformers.GPT2Config
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        given = mapping.get(config, None) if isinstance(auto, type) and mapping is not None else None
        if given in classes:
            auto.register(config, classes[given], exist_ok=True)


def register() -> None:
    """Lets AutoModel, AutoModelForCausalLM and transformers' other Auto classes give this module's for a GPT-2.

    What loads a model by its folder's name (pipeline, lm-evaluation-harness) then gets these. `unregister` undoes it.
    """
    _give(PATCHED)


def unregister() -> None:
    """Lets transformers' Auto classes give transformers' own GPT-2 classes again."""
    _give(ORIGINAL)
