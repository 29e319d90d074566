"""GPT-2's configuration: the field names, defaults and config.json of transformers' GPT2Config."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

# The first two name GELU's tanh approximation, the one GPT-2 was trained with; the last is GELU itself, by erf.
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu")

MAX_HEAD_DIM = 128

PRESETS: dict[str, dict[str, int]] = {
    "nano": {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 256},
    "distilgpt2": {"n_layer": 6, "n_head": 12, "n_embd": 768},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

# transformers accepts these names for the same fields.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """What a GPT-2 is made of. Immutable; `dataclasses.replace(config, ...)` makes a changed copy.

    Raises ValueError (one line: field, value, fix) for a value that no implementation can run.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):  # JSON's lists would make the config unhashable
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        sizes = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
        for name in sizes + (["n_inner"] if self.n_inner is not None else []):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            value = getattr(self, name)
            if not _is_real(value) or not 0.0 <= value < 1.0:
                raise ValueError(f"{name} is {value!r}; a dropout probability is at least 0 and less than 1")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not _is_real(value) or not 0.0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}; give a number greater than 0")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function is {self.activation_function!r}; use one of {', '.join(ACTIVATIONS)}"
            )
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd is {self.n_embd}, which n_head = {self.n_head} does not divide; "
                "choose n_embd as a multiple of n_head"
            )
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"n_head is {self.n_head}, which makes heads of n_embd / n_head = {self.head_dim}; "
                f"use at least {-(-self.n_embd // MAX_HEAD_DIM)} heads: a head has at most {MAX_HEAD_DIM}"
            )

    # transformers' names for what has another here, to be read: programs ask a config of any model for them.
    model_type = "gpt2"
    is_encoder_decoder = False

    @property
    def hidden_size(self) -> int:
        """n_embd."""
        return self.n_embd

    @property
    def max_position_embeddings(self) -> int:
        """n_positions."""
        return self.n_positions

    @property
    def num_attention_heads(self) -> int:
        """n_head."""
        return self.n_head

    @property
    def num_hidden_layers(self) -> int:
        """n_layer."""
        return self.n_layer

    @property
    def head_dim(self) -> int:
        """D, the size of one attention head."""
        return self.n_embd // self.n_head

    @property
    def n_inner_(self) -> int:
        """F, the MLP's width: n_inner, or 4 * n_embd where that is None."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> GPT2Config:
        """A named size, with any field replaced. Raises ValueError for an unknown name or field."""
        if name not in PRESETS:
            raise ValueError(f"unknown model {name!r}; the presets are {', '.join(PRESETS)}")
        unknown = overrides.keys() - _FIELDS
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]} is no field of GPT2Config; it has {', '.join(_FIELDS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GPT2Config:
        """From the keys of a config.json. Keys that do not change the arithmetic are ignored.

        Raises ValueError for another architecture, and for options of transformers' GPT-2 that would change
        the results if ignored (cross-attention, attention that is not causal, quantised weights).
        """
        model_type = data.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type is {model_type!r}; only 'gpt2' can be loaded")
        if data.get("add_cross_attention"):
            raise ValueError("add_cross_attention is true; a GPT-2 decoder with cross-attention is not supported")
        if data.get("is_causal") not in (None, True):
            raise ValueError(f"is_causal is {data['is_causal']!r}; attention here is causal, and gpt2_fast.hf has both")
        if data.get("quantization_config"):
            raise ValueError("quantization_config is set; load a checkpoint with unquantised weights")
        known = {_ALIASES.get(key, key): value for key, value in data.items()}
        return cls(**{name: known[name] for name in _FIELDS if name in known})

    def to_dict(self) -> dict[str, Any]:
        """The keys of a config.json that transformers loads as a GPT2LMHeadModel's."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        return {"architectures": ["GPT2LMHeadModel"], "model_type": self.model_type, **fields}

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> GPT2Config:
        """Read a config.json. Raises FileNotFoundError, or ValueError that names the path."""
        path = Path(path)
        if not path.is_file():
            inside = min(path.parent.glob(f"*/{path.name}"), default=None)  # of a run, its newest checkpoint
            more = f"; {inside.parent} has one" if inside else ""
            raise FileNotFoundError(f"{path} does not exist; a GPT-2 checkpoint has a config.json{more}")
        data = read_object(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write a config.json."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds. Raises ValueError, one line, for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it may be truncated") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not a JSON object; it may be damaged")
    return data


def _refuse_assignment(self: GPT2Config, name: str, value: Any) -> None:
    field = _ALIASES.get(name, name)
    raise dataclasses.FrozenInstanceError(
        f"GPT2Config.{name} cannot be set; dataclasses.replace(config, {field}={value!r}) makes a changed copy, and "
        "what sets it, as transformers' Trainer does, takes gpt2_fast.hf.GPT2LMHeadModel"
    )


GPT2Config.__setattr__ = _refuse_assignment  # type: ignore[method-assign]

_FIELDS: dict[str, None] = dict.fromkeys(field.name for field in dataclasses.fields(GPT2Config))


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def num_params(config: GPT2Config) -> int:
    """Parameters of a GPT2LMHeadModel, a tied head counted once: 124,439,808 for gpt2."""
    C, F = config.n_embd, config.n_inner_
    embeddings = (config.vocab_size + config.n_positions) * C
    attention = (3 * C * C + 3 * C) + (C * C + C)
    mlp = (C * F + F) + (F * C + C)
    layernorm = 2 * C
    blocks = config.n_layer * (attention + mlp + 2 * layernorm)
    head = 0 if config.tie_word_embeddings else config.vocab_size * C
    return embeddings + blocks + layernorm + head
