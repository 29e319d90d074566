"""Modules that a fused operation stands for: when it may read their weights, and when it must call them.

State of the process: `_FORWARDS`, the forward that each class had when it was first seen here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

Hook = Callable


def part(cls: type[nn.Module]) -> type[nn.Module]:
    """Marks a class of this package's model: of a module of it, not of a subclass, the weights say all that it does."""
    cls._is_part_of_gpt2 = True
    remember(cls)
    return cls


def _is_part(cls: type[nn.Module]) -> bool:
    return "_is_part_of_gpt2" in cls.__dict__


_FORWARDS: dict[type, Callable | None] = {}


def remember(*kinds: type) -> None:
    """Notes the forward of classes of torch, transformers or this package; another, since or before, is `changed`."""
    for kind in kinds:
        _FORWARDS[kind] = kind.forward if kind.forward.__module__ == kind.__module__ else None


remember(nn.Dropout, nn.Embedding, nn.LayerNorm, nn.Linear)


def changed(kind: type) -> bool:
    """Whether somebody gave a remembered class another forward, as programs do that bring kernels of their own."""
    return kind in _FORWARDS and kind.forward is not _FORWARDS[kind]


def has_global_hooks() -> bool:
    """Whether something listens to the calls of all modules."""
    m = torch.nn.modules.module
    return bool(
        m._global_forward_hooks or m._global_forward_pre_hooks or m._global_backward_hooks
        or m._global_backward_pre_hooks
    )  # fmt: skip


def has_hooks(module: nn.Module) -> bool:
    """Whether something listens to the module's calls, or changes them."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def foreign(module: nn.Module, *kinds: type, idle: Callable[[Hook, nn.Module], bool] | None = None) -> str | None:
    """Why `module` must be called as the module it is; None where it is plainly one of `kinds`.

    A hook, a forward of its own or of its class's, another class (a subclass, an adapter, a quantised or pruned layer)
    or another kind of weight would be without effect if an operation read the weight. idle: which forward hooks do
    nothing in a call.
    """
    if type(module) not in kinds:
        return f"is {type(module).__module__}.{type(module).__qualname__}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if "__call__" in type(module).__dict__:
        return "has a __call__ of its own"
    if changed(type(module)):
        return f"has another forward: {type(module).forward.__module__}.{type(module).forward.__qualname__}"
    if has_global_hooks():
        return "is listened to by hooks of all modules"
    if has_hooks(module):
        hooks = [hook for hook in module._forward_hooks.values() if idle is None or not idle(hook, module)]
        if hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "has hooks"
    weight = module._parameters.get("weight")
    if weight is None and type(module) is nn.LayerNorm:
        return "has no weight"
    if weight is not None and type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"has a weight that is {type(weight).__qualname__}"
    return None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a product may read the module's weight_io and bias instead of calling it."""
    return "weight_io" in type(module).__dict__ and foreign(module, type(module)) is None


def is_plain_table(table: nn.Module) -> bool:
    """Whether `embedding` may read the table instead of calling it: an nn.Embedding without options or hooks."""
    if foreign(table, nn.Embedding):
        return False
    return table.padding_idx is None and table.max_norm is None and not (table.sparse or table.scale_grad_by_freq)


def is_plain_head(head: nn.Module) -> bool:
    """Whether an operation may read the head's weight [V, C] instead of calling it."""
    return foreign(head, nn.Linear) is None and head.bias is None


def foreign_part(transformer: nn.Module) -> str | None:
    """Which module of this package's model must be called as the module it is, and why; None: none."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Embedding):
            reason = None if is_plain_table(module) else foreign(module, nn.Embedding) or "has options"
        else:
            own = (type(module),) if _is_part(type(module)) else (nn.LayerNorm, nn.ModuleList)
            reason = foreign(module, *own)
        if reason:
            return f"transformer{'.' if name else ''}{name} {reason}"
    return None


def is_plain_part(module: nn.Module) -> bool:
    """Whether the module is a plain one of those that this package's model is made of, head included."""
    kind = type(module)
    known = _is_part(kind) or kind in (nn.Embedding, nn.LayerNorm, nn.Linear, nn.ModuleList)
    return known and not foreign(module, kind)


def bias_of(layer: nn.Module) -> Tensor:
    """The bias, or zeros where a layer has none, whose weight is [out, in] or a LayerNorm's then."""
    return layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on it: its parameters are whole within its forward and backward alone."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, getattr(fsdp, "FSDPModule", ()))


# What to do with a model that `fully_shard` was called on where something reads its weights outside of its forward.
GATHER = (
    "the model is sharded by fully_shard, and its weights are whole within its own forward alone; load what "
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
    "torch.distributed.checkpoint.state_dict gives into a model that is not sharded"
)


def check_not_sharded(model: nn.Module, what: str) -> None:
    """Raises ValueError, one line that begins with `what`, for a model that `fully_shard` was called on."""
    if is_sharded(model):
        raise ValueError(f"{what}: {GATHER}")


def check_tied(head: nn.Module, table: nn.Module, untie: str) -> None:
    """Raises ValueError where steps would move a tied head and token embedding apart: in a call that records gradients.

    They are one parameter until something replaces one of them, as `parallelize_module` does. Modules of other classes
    (an adapter's), heads of another shape, weights on "meta" (accelerate's offloading leaves them there) and tensors
    that stand in for parameters (`functional_call`) pass. untie: what makes a model that keeps two on purpose.
    """
    if type(head) is not nn.Linear or type(table) is not nn.Embedding or head.weight is table.weight:
        return
    weights = head.weight, table.weight
    one_is_sharded = hasattr(head.weight, "device_mesh") != hasattr(table.weight, "device_mesh")
    if not one_is_sharded and not all(isinstance(w, nn.Parameter) for w in weights):
        return
    trained = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
    if not trained or head.weight.shape != table.weight.shape or any(w.is_meta for w in weights):
        return
    what = "lm_head.weight and transformer.wte.weight are tied and now two parameters, which steps would move apart: "
    again = "assign lm_head.weight = transformer.wte.weight before the optimizer is made"
    if one_is_sharded:
        raise ValueError(f"{what}give both to parallelize_module (or to one fully_shard), then {again}")
    raise ValueError(f"{what}{again}, or {untie}")
