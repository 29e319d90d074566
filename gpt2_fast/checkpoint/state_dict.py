"""The tensors of a GPT-2 by name and shape, and how nanoGPT and llm.c lay them out.

Names are those of transformers' GPT2LMHeadModel, weights of linear layers [in, out]. nanoGPT and llm.c store them
[out, in]. Nothing but the layout changes, so every number keeps its bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from gpt2_fast.checkpoint import plain
from gpt2_fast.config import GPT2Config, num_params

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Causal masks that older transformers stored beside the weights.
_MASK = re.compile(r"\.attn\.(masked_)?bias$")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The GELU that each of the two computes, whatever a checkpoint was trained with.
ACTIVATIONS = {"nanogpt": "gelu", "llmc": "gelu_new"}


def check_plausible(config: GPT2Config, held: int, what: str) -> None:
    """Raises ValueError for a config of far more parameters than there are numbers, before anything of it is made.

    held: the most numbers that the weights can be. what: they are in. A layer too many is left to the names' check.
    """
    if num_params(config) > 2 * held + (1 << 20):
        sizes = ", ".join(
            f"{name} {getattr(config, name)}" for name in ("n_layer", "n_embd", "vocab_size", "n_positions")
        )
        raise ValueError(
            f"the config asks for {num_params(config):,} parameters ({sizes}) and {what} at most {held:,}; "
            "one of the two is of another model, or damaged"
        )


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a GPT2LMHeadModel, the head included even where it is tied."""
    C, F = config.n_embd, config.n_inner_
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, C),
        "transformer.wpe.weight": (config.n_positions, C),
    }
    for i in range(config.n_layer):
        layers = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
        layers |= {"ln_2": (C,), "mlp.c_fc": (C, F), "mlp.c_proj": (F, C)}
        for name, shape in layers.items():
            shapes[f"transformer.h.{i}.{name}.weight"] = shape
            shapes[f"transformer.h.{i}.{name}.bias"] = shape[-1:]
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (C,)
    shapes[HEAD] = (config.vocab_size, C)
    return shapes


def canonical_state_dict(state_dict: Mapping[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """The state dict of a GPT2LMHeadModel from that of any GPT-2: as `load_state_dict(strict=True)` takes it.

    Adds the prefix "transformer." where the names lack it, leaves stored masks out, and where the config ties
    the head, gives lm_head.weight the tensor of the embedding. Raises ValueError, one line that names the
    tensors, where some are missing, not GPT-2's, or of a shape that does not fit the config; TypeError for a DTensor.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        plain.check_whole(name, tensor)
        if not _MASK.search(name):
            tensors[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = tensor
    if config.tie_word_embeddings and EMBEDDING in tensors:
        head = tensors.setdefault(HEAD, tensors[EMBEDDING])
        if head is not tensors[EMBEDDING] and not torch.equal(head, tensors[EMBEDDING]):
            raise ValueError(f"{HEAD} differs from {EMBEDDING}; set tie_word_embeddings to false in the config")
        tensors[HEAD] = tensors[EMBEDDING]
    check_plausible(config, sum(t.numel() for t in tensors.values()), "the weights hold")
    check_layers(tensors, config)
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{name} is {str(tensor.dtype)[6:]}; weights are {', '.join(str(d)[6:] for d in WEIGHT_DTYPES)}"
            )
    shapes = expected_shapes(config)
    if missing := shapes.keys() - tensors.keys():
        raise ValueError(f"the weights miss {_some(missing)}, which the config asks for")
    if extra := tensors.keys() - shapes.keys():
        raise ValueError(f"the weights have {_some(extra)}, which a GPT-2 language model of this config does not have")
    wrong = [name for name, shape in shapes.items() if tuple(tensors[name].shape) != shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{name} has shape {list(tensors[name].shape)}, the config asks for {list(shapes[name])}"
            + (f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else "")
        )
    return {name: tensors[name] for name in shapes}


def check_same_head(state_dict: Mapping[str, Any], prefix: str, why: str) -> None:
    """Raises ValueError where a tied model's head and token embedding are both there and differ.

    Loaded in turn, the later of the two would overwrite the other. Of DTensors this rank's parts are compared.
    why: they may not, and what to do; the end of the message.
    """
    head, wte = (state_dict.get(prefix + name) for name in (HEAD, EMBEDDING))
    if not (isinstance(head, Tensor) and isinstance(wte, Tensor)) or head is wte:
        return
    if all(hasattr(t, "device_mesh") and t.placements == wte.placements for t in (wte, head)):
        head, wte = head.to_local(), wte.to_local()
    if head.is_meta or wte.is_meta or is_fake(head) or is_fake(wte):
        return
    same = head.shape == wte.shape and head.dtype == wte.dtype
    if same:
        wte = wte.to(head.device)
        # The same NaNs are no difference: a model that diverged is still tied.
        same = torch.equal(head, wte) or torch.allclose(head, wte, rtol=0.0, atol=0.0, equal_nan=True)
    if not same:
        raise ValueError(f"{prefix}{HEAD} and {prefix}{EMBEDDING} differ and {why}")


def assign_to_both(state_dict: dict[str, Any], prefix: str, metadata: Mapping[str, Any], missing: list[str]) -> None:
    """Before a load into a tied model: what is assigned to its head or its embedding alone goes to both.

    Otherwise tying the two again would lose it. The other one counts as missing still. metadata: as torch passes it.
    """
    names = [prefix + HEAD, prefix + EMBEDDING]
    if metadata.get("assign_to_params_buffers") and sum(name in state_dict for name in names) == 1:
        there, absent = sorted(names, key=lambda name: name not in state_dict)
        state_dict[absent] = state_dict[there]
        missing.append(absent)


def check_layers(tensors: Mapping[str, Tensor], config: GPT2Config) -> None:
    """Raises ValueError where there are fewer tensors than layers: a damaged n_layer may ask for billions of names."""
    if config.n_layer > len(tensors):
        raise ValueError(f"n_layer is {config.n_layer} and the weights have {len(tensors)} tensors")


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def transposed(name: str, tensor: Tensor) -> Tensor:
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


def token_ids(vocab_size: Any) -> dict[str, int | None]:
    """End-of-text of GPT-2's tokenizer, or none in a vocabulary that lacks it (nanoGPT's character models)."""
    token = 50256 if isinstance(vocab_size, int) and vocab_size > 50256 else None
    return {"bos_token_id": token, "eos_token_id": token}
