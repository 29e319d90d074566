"""`gpt2_fast.patch`: an existing transformers GPT-2 on this package's operations, in place; `unpatch` puts it back.

Parameters, names, objects and the config stay: what changes is the class of the model, its GPT2Model and its blocks
(`classes.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

try:
    from transformers.models.gpt2 import modeling_gpt2
except ImportError as error:
    raise ImportError(f"gpt2_fast.patch needs transformers; run: pip install transformers ({error})") from None

from gpt2_fast.hf_patch import classes, modules
from gpt2_fast.modules import is_sharded


class Row(NamedTuple):
    """One line of `explain`: which module, what of it, which path it takes, and why where that is transformers'."""

    module: str
    part: str
    runs: str
    why: str


def _bodies(model: nn.Module) -> dict[str, nn.Module]:
    """Every GPT2Model in `model`, patched or not, by name. Raises TypeError or ValueError where there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"gpt2_fast.patch takes a transformers GPT-2 model, not {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, modeling_gpt2.GPT2Model)}
    if not found:
        raise ValueError(
            f"gpt2_fast.patch: {type(model).__module__}.{type(model).__name__} holds no transformers GPT2Model; pass a "
            "GPT2Model, a GPT2LMHeadModel, another GPT-2 head, or a model around one"
        )
    return found


def _check_placement(model: nn.Module) -> None:
    places: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        places.setdefault(str(parameter.device), name)
    if len(places) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(f"gpt2_fast.patch: the model is on several devices ({where}); move it to one first")


def _check_sharding(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_sharded(module):
            raise ValueError(
                f"gpt2_fast.patch: {name or 'the model'} is sharded already; call gpt2_fast.patch before fully_shard"
            )


def patch(model: nn.Module) -> nn.Module:
    """Routes a transformers GPT-2 through gpt2_fast's operations, in place; `unpatch` puts it back.

    Args:
        model: GPT2Model, GPT2LMHeadModel, another GPT-2 head, your own subclass of one, or any module around them
            (PEFT, torch.compile).

    Returns:
        `model` itself. `gpt2_fast.doctor.explain_patch(model)` says what runs where and why. Patching twice is
        patching once.

    Raises:
        TypeError, ValueError: no GPT-2 of transformers in it, parameters on several devices, or `fully_shard` was
            called on it.
    """
    _bodies(model)
    _check_placement(model)
    _check_sharding(model)
    classes.swap(model)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes `patch`; a model that is not patched stays as it is. Returns `model`.

    Raises ValueError for a model of your own class made from one of `gpt2_fast.hf`: it was never another.
    """
    _bodies(model)
    classes.swap_back(model)
    return model


def _row(module: str, part: str, op: str, reason: str | None) -> Row:
    return Row(module, part, "transformers" if reason else op, reason or "")


def _block_rows(name: str, block: nn.Module, loop: str | None) -> list[Row]:
    """loop: why the loop over the blocks is not this package's."""
    why = modules.forward_of(block, modules.BlockForward)
    if why or hasattr(block, "crossattention"):
        return [Row(name, "block", "transformers", why or "the model has cross-attention")]
    kept = modules.attention_taken(block)
    if loop and kept is None:
        kept = "transformers makes its mask; with sdpa, no padding and no past it makes none, and attention runs here"
    rows = [
        _row(f"{name}.ln_1", "LayerNorm", "add_layernorm", modules.foreign(block.ln_1, nn.LayerNorm)),
        _row(f"{name}.attn", "attention", "attention, attention_decode", kept),
    ]
    for path, module in (("attn.c_attn", block.attn.c_attn), ("attn.c_proj", block.attn.c_proj)):
        reason = "attention stays there" if kept else modules.foreign(module, modules.Conv1D)
        rows.append(_row(f"{name}.{path}", "projection", "linear", reason))
    reason = modules.mlp_fused(block)
    rows.append(_row(f"{name}.mlp", "ln_2, c_fc, GELU and c_proj as one", "mlp", reason))
    reason = modules.foreign(block.mlp.c_proj, modules.Conv1D)
    rows.append(_row(f"{name}.mlp.c_proj", "projection", "linear", reason))
    return rows


def _why_not_patched(module: nn.Module, ours: type) -> str | None:
    """Whose forward runs; None for this package's."""
    return modules.forward_of(module, ours) if isinstance(module, ours) else "it is not patched"


def explain(model: nn.Module) -> list[Row]:
    """What runs where in a patched (or not patched) model, module by module."""
    rows = []
    for name, body in _bodies(model).items():
        name = name or "(the model)"
        loop = _why_not_patched(body, modules.ModelForward) or modules.loop_taken(body)
        rows.append(_row(name, "wte, wpe and dropout", "embedding", loop or modules.embedding_taken(body)))
        for i, block in enumerate(body.h):
            rows += _block_rows(f"{name}.h.{i}", block, loop)
        reason = loop or modules.foreign(body.ln_f, nn.LayerNorm)
        rows.append(_row(f"{name}.ln_f", "LayerNorm", "add_layernorm", reason))
    for name, module in model.named_modules():
        if isinstance(module, modeling_gpt2.GPT2LMHeadModel):
            reason = _why_not_patched(module, modules.LMForward) or modules.loss_taken(module)
            rows.append(_row(f"{name or '(the model)'}", "head and loss", "linear_cross_entropy", reason))
    return rows
