"""nanoGPT's ckpt.pt and llm.c's .bin checkpoints, as a config and a state dict and back.

State dicts are GPT2LMHeadModel's: names as in transformers, weights of linear layers [in, out]. Both formats store
them [out, in]. Nothing but the layout changes, so every number keeps its bits; see `write_llmc` for the one place
where a dtype is chosen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2_fast.checkpoint.hf import EMBEDDING, HEAD, canonical_state_dict, expected_shapes, torch_load
from gpt2_fast.config import GPT2Config, num_params
from gpt2_fast.files import atomic_write

LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# nanoGPT's model_args and what they are called here.
_NANOGPT = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
# The GELU that each of the two computes, whatever a checkpoint was trained with.
ACTIVATIONS = {"nanogpt": "gelu", "llmc": "gelu_new"}
COMPILED = "_orig_mod."  # the prefix of a state dict of a torch.compile'd module

# llm.c's header: 256 int32. Its padded versions alone are read: 1 and 2 differ in layout and are long replaced.
LLMC_MAGIC, LLMC_HEADER = 20240326, 256
LLMC_VERSIONS = {3: torch.float32, 5: torch.bfloat16}
LLMC_VOCAB_MULTIPLE = 128
_LLMC_FIELDS = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd", "padded vocab_size")
# The order in which llm.c stores the layers' tensors, each stacked over the layers.
_LLMC_LAYERS = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip


def _transposed(name: str, tensor: Tensor) -> Tensor:
    """[in, out] <-> [out, in] for the weights of linear layers; the tensor itself for all others."""
    return tensor.t().contiguous() if name.endswith(LINEAR) else tensor


def check_expressible(config: GPT2Config, kind: str) -> None:
    """Raises ValueError, one line, for a model that nanoGPT and llm.c, `kind` of them, cannot compute."""
    needed = {
        "n_inner_": 4 * config.n_embd,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ValueError(f"{kind} has no {name.strip('_')} = {getattr(config, name)!r}; only {value!r}")


def _token_ids(vocab_size: Any) -> dict[str, int | None]:
    """End-of-text of GPT-2's tokenizer, or none in a vocabulary that lacks it (nanoGPT's character models)."""
    token = 50256 if isinstance(vocab_size, int) and vocab_size > 50256 else None
    return {"bos_token_id": token, "eos_token_id": token}


def read_nanogpt(path: str | os.PathLike[str]) -> tuple[GPT2Config, dict[str, Tensor], list[str]]:
    """Config, state dict and notes for the user from a ckpt.pt of nanoGPT's train.py, read as weights only.

    Its activation_function is "gelu", by erf. A model without biases gets zero biases, which compute the same.
    vocab_size stays padded where it was.
    Raises FileNotFoundError or ValueError, one line, for a missing, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a ckpt.pt of nanoGPT")
    data = torch_load(path)
    state, arguments = (data.get("model"), data.get("model_args")) if isinstance(data, Mapping) else (None, None)
    if not isinstance(state, Mapping) or not isinstance(arguments, Mapping):
        raise ValueError(f"{path} is not a nanoGPT checkpoint: it has no 'model' and 'model_args'")
    if not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} is not a nanoGPT checkpoint: its 'model' holds more than tensors by name")
    try:
        config, bias = nanogpt_config(arguments)
        state = {name.removeprefix(COMPILED): tensor for name, tensor in state.items()}
        if not bias:
            for name, shape in expected_shapes(config).items():
                if name.endswith(".bias"):
                    weight = state.get(f"{name[:-5]}.weight")
                    state.setdefault(name, torch.zeros(shape, dtype=None if weight is None else weight.dtype))
        state = {name: _transposed(name, tensor) if tensor.ndim == 2 else tensor for name, tensor in state.items()}
        state = canonical_state_dict(state, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    notes = [] if bias else ["the model has no biases; zeros stand in for them and compute the same"]
    return config, state, notes


def nanogpt_config(arguments: Mapping[str, Any]) -> tuple[GPT2Config, bool]:
    """What nanoGPT's model_args (the fields of its GPTConfig) are here, and whether its layers have biases.

    Raises ValueError, one line, for a size that is missing or does not fit, and for an option that nanoGPT lacks.
    """
    if missing := [name for name in _NANOGPT if name not in arguments]:
        raise ValueError(f"model_args has no {missing[0]}")
    for name, value in arguments.items():
        if name not in (*_NANOGPT, "bias", "dropout") and value:
            raise ValueError(f"model_args has {name} = {value!r}, which a GPT-2 has not")
    sizes = {ours: arguments[theirs] for theirs, ours in _NANOGPT.items()}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), arguments.get("dropout", 0.0))
    config = GPT2Config(
        **sizes, **dropout, **_token_ids(sizes["vocab_size"]), activation_function=ACTIVATIONS["nanogpt"]
    )
    return config, bool(arguments.get("bias", True))  # checkpoints older than the option have biases


def nanogpt_arguments(config: GPT2Config) -> dict[str, Any]:
    """nanoGPT's sizes and bias of a config, as its GPTConfig takes them; no dropout."""
    return {theirs: getattr(config, ours) for theirs, ours in _NANOGPT.items()} | {"bias": True}


def nanogpt_state(state_dict: Mapping[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """A GPT2LMHeadModel's state dict as nanoGPT's GPT loads it, on the CPU, the tied head stored once."""
    state = {n: _transposed(n, t.detach().cpu()) for n, t in canonical_state_dict(state_dict, config).items()}
    state[HEAD] = state[EMBEDDING]
    return state


def write_nanogpt(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], config: GPT2Config) -> None:
    """Write a ckpt.pt that nanoGPT's sample.py loads; it holds no optimizer, so train.py cannot resume from it.

    Raises ValueError for a model that nanoGPT cannot compute, OSError where the file cannot be written.
    """
    check_expressible(config, "nanoGPT")
    if not config.embd_pdrop == config.attn_pdrop == config.resid_pdrop:
        raise ValueError("nanoGPT has one dropout; make embd_pdrop, attn_pdrop and resid_pdrop equal in config.json")
    state, arguments = nanogpt_state(state_dict, config), nanogpt_arguments(config) | {"dropout": config.resid_pdrop}
    data = {"model": state, "model_args": arguments, "iter_num": 0, "best_val_loss": math.inf, "config": {}}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(data, file)


def _llmc_order(config: GPT2Config) -> Iterator[str]:
    """The tensors' names in the order in which llm.c stores them."""
    yield from (EMBEDDING, "transformer.wpe.weight")
    for name in _LLMC_LAYERS:
        yield from (f"transformer.h.{i}.{name}" for i in range(config.n_layer))
    yield from ("transformer.ln_f.weight", "transformer.ln_f.bias")


def read_llmc(path: str | os.PathLike[str]) -> tuple[GPT2Config, dict[str, Tensor], list[str]]:
    """Config, state dict and notes for the user from an llm.c checkpoint: version 3 (float32) or 5 (bfloat16).

    The rows that pad the vocabulary are left out. llm.c trains without dropout, so the config has none.
    Raises FileNotFoundError or ValueError, one line, for a missing, truncated, foreign or mis-sized file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give an llm.c checkpoint")
    header = np.fromfile(path, dtype="<i4", count=LLMC_HEADER)
    if len(header) == 0 or header[0] != LLMC_MAGIC:
        raise ValueError(f"{path} is not an llm.c checkpoint: it does not begin with {LLMC_MAGIC}")
    if len(header) < LLMC_HEADER:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, less than its header of {4 * LLMC_HEADER}: truncated"
        )
    version, *sizes = (int(value) for value in header[1:8])
    if version not in LLMC_VERSIONS:
        raise ValueError(f"{path} is version {version} of llm.c's checkpoints; 3 (float32) and 5 (bfloat16) are read")
    dtype, fields = LLMC_VERSIONS[version], dict(zip(_LLMC_FIELDS, sizes, strict=True))
    padded = fields.pop("padded vocab_size")
    try:
        config = GPT2Config(**fields, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **_token_ids(sizes[1]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if padded < config.vocab_size:
        raise ValueError(f"{path}: padded vocab_size is {padded}, less than vocab_size {config.vocab_size}")
    stored = num_params(config) + (padded - config.vocab_size) * config.n_embd
    expected = 4 * LLMC_HEADER + dtype.itemsize * stored
    if (size := path.stat().st_size) != expected:
        what = "truncated" if size < expected else "longer than its header says"
        raise ValueError(f"{path} has {size} bytes and its header asks for {expected}: {what}")
    data = torch.from_numpy(np.memmap(path, np.uint8, mode="c", offset=4 * LLMC_HEADER)).view(dtype)
    shapes = expected_shapes(config) | {EMBEDDING: (padded, config.n_embd)}
    state, start = {}, 0
    for name in _llmc_order(config):
        shape = shapes[name][::-1] if name.endswith(LINEAR) else shapes[name]
        state[name] = _transposed(name, data[start : start + math.prod(shape)].view(shape))
        start += math.prod(shape)
    state[EMBEDDING] = state[EMBEDDING][: config.vocab_size]
    return config, canonical_state_dict(state, config), []


def write_llmc(
    path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], config: GPT2Config, *, dtype: torch.dtype
) -> None:
    """Write an llm.c checkpoint, version 3 for dtype float32 and 5 for bfloat16, vocabulary padded with zero rows.

    Raises ValueError for a model that llm.c cannot compute, OSError where the file cannot be written.
    """
    check_expressible(config, "llm.c")
    if dtype not in LLMC_VERSIONS.values():
        raise ValueError(f"llm.c has no checkpoints in {str(dtype)[6:]}; choose float32 or bfloat16")
    version = next(version for version, stored in LLMC_VERSIONS.items() if stored == dtype)
    padded = -(-config.vocab_size // LLMC_VOCAB_MULTIPLE) * LLMC_VOCAB_MULTIPLE
    header = np.zeros(LLMC_HEADER, dtype="<i4")
    header[:8] = LLMC_MAGIC, version, *(getattr(config, name) for name in _LLMC_FIELDS[:-1]), padded
    state = canonical_state_dict(state_dict, config)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        for name in _llmc_order(config):
            tensor = _transposed(name, state[name].detach().to("cpu", dtype)).contiguous()
            file.write(tensor.view(torch.uint8).numpy().data)
            if name == EMBEDDING:
                file.write(bytes((padded - config.vocab_size) * config.n_embd * dtype.itemsize))
