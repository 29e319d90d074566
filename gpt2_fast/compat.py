"""The calls that transformers' users make of this package's own model: what is cheap works as there.

What is not raises one line that names `gpt2_fast.hf`, whose GPT2LMHeadModel is transformers' class on these operations.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpt2_fast.config import GPT2Config

# What forward and from_pretrained also take, and the values besides None that ask for nothing.
_FORWARD: dict[str, tuple] = {
    "use_cache": (False,), "output_attentions": (False,), "output_hidden_states": (False,), "return_dict": (True,),
} | dict.fromkeys(("inputs_embeds", "past_key_values", "cache", "cache_position", "encoder_hidden_states",
                   "encoder_attention_mask", "head_mask"), ())  # fmt: skip
_LOADING: dict[str, tuple] = {
    "low_cpu_mem_usage": (True, False), "use_safetensors": (True,), "trust_remote_code": (False,),
    "force_download": (False,), "output_loading_info": (False,),
} | dict.fromkeys(("attn_implementation", "config", "quantization_config", "subfolder", "token", "variant",
                   "max_memory", "offload_folder", "state_dict", "proxies"), ())  # fmt: skip
# Methods of transformers' class that need what this one does not have, and that no library asks for by hasattr.
_METHODS = ("resize_token_embeddings", "set_input_embeddings", "set_attn_implementation", "push_to_hub", "add_adapter",
            "get_memory_footprint", "init_weights")  # fmt: skip


def refuse(call: str) -> str:
    """The line for a call that only transformers' class takes."""
    return f"gpt2_fast.GPT2LMHeadModel does not do {call}; gpt2_fast.hf.GPT2LMHeadModel, transformers' own class, does"


def refuse_others(where: str, neutral: Mapping[str, tuple], given: Mapping[str, Any]) -> None:
    """Raises TypeError for an unknown argument of `where`, ValueError for one that asks for what it does not do.

    neutral: for each known argument the values besides None that ask for nothing.
    """
    for name, value in given.items():
        if name not in neutral:
            raise TypeError(f"{where} has no argument {name!r}")
        if value is None or (isinstance(value, numbers.Number) and value in neutral[name]):
            continue
        shown = "a tensor" if isinstance(value, Tensor) else " ".join(f"{value!r:.80}".split())
        raise ValueError(refuse(f"{where}({name}={shown})"))


def logits_to_keep(options: dict[str, Any], scored: bool) -> int:
    """How many last positions forward gives logits of, 0 for all; `options` are its further arguments.

    Raises ValueError for what asks for more than this model does (scored: targets are given, and the loss needs every
    position), TypeError for an unknown argument.
    """
    others = dict(options)
    keep = others.pop("logits_to_keep", 0)
    refuse_others("forward", _FORWARD, others)
    if not isinstance(keep, int) or keep < 0 or (keep and scored):
        beside = " beside labels" if scored else ""
        raise ValueError(refuse(f"forward(logits_to_keep={keep if isinstance(keep, int) else 'a tensor'}){beside}"))
    return keep


def placement(dtype: Any, device: Any, options: dict[str, Any]) -> tuple[torch.dtype | None, Any]:
    """dtype and device of `from_pretrained`, from transformers' names for them: torch_dtype, device_map.

    Raises ValueError for two that differ, for a map over devices, and for what only transformers' class takes.
    """
    others = dict(options)
    dtype = _same("dtype", dtype, "torch_dtype", others.pop("torch_dtype", None))
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype, dtype)
        if isinstance(dtype, str):
            raise ValueError(f"dtype is {dtype!r}; weights are float32, bfloat16, float16 or float64")
    wanted = others.pop("device_map", None)
    if isinstance(wanted, Mapping) and list(wanted) == [""]:
        wanted = wanted[""]
    if isinstance(wanted, Mapping) or wanted in ("auto", "balanced", "balanced_low_0", "sequential", "disk"):
        raise ValueError(refuse(f"from_pretrained(device_map={wanted!r})"))
    refuse_others("from_pretrained", _LOADING, others)
    return dtype, _same("device", device, "device_map", wanted)


def _same(name: str, value: Any, alias: str, other: Any) -> Any:
    if value is not None and other is not None and value != other:
        raise ValueError(f"{name} is {value!r} and {alias} {other!r}; pass one")
    return other if value is None else value


def config_of(config: Any) -> GPT2Config:
    """`config`, or the GPT2Config of transformers' config of that name. Raises TypeError for anything else."""
    if isinstance(config, GPT2Config):
        return config
    if not hasattr(config, "to_dict"):
        raise TypeError(f"config is {type(config).__name__}; it must be a GPT2Config, this package's or transformers'")
    return GPT2Config.from_dict(config.to_dict())


class Compatible(nn.Module):
    """What transformers' models have beside forward, where it needs only what an nn.Module has."""

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.get_input_embeddings().weight.dtype

    base_model_prefix, main_input_name = "transformer", "input_ids"

    @property
    def base_model(self) -> nn.Module:
        """The model without its head."""
        return self.transformer

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether `gradient_checkpointing_enable` was called last."""
        return self.transformer.gradient_checkpointing

    def can_generate(self) -> bool:
        """True: there is a `generate`."""
        return True

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Keeps only the inputs of each block in training and computes the rest again in backward."""
        self.transformer.gradient_checkpointing = bool(enabled)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps everything again."""
        self.transformer.gradient_checkpointing = False

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Parameters, the tied head counted once; those that require a gradient only, with only_trainable."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)


def _refusing(name: str):
    def method(self, *_: Any, **__: Any):
        raise NotImplementedError(refuse(f"{name}()"))

    method.__name__, method.__doc__ = name, "Raises NotImplementedError, which names transformers' own class."
    return method


for _name in _METHODS:
    setattr(Compatible, _name, _refusing(_name))
