"""Modules that a fused operation stands for: when it may read their weights, and when it must call them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Hook = Callable


def foreign(module: nn.Module, *kinds: type, idle: Callable[[Hook, nn.Module], bool] | None = None) -> str | None:
    """Why `module` must be called as the module it is; None where it is plainly one of `kinds`.

    A hook, a forward of its own, another class (a subclass, an adapter, a quantised or pruned layer) or another kind of
    weight would be without effect if an operation read the weight. idle: which forward hooks do nothing in a call.
    """
    if type(module) not in kinds:
        return f"is {type(module).__module__}.{type(module).__qualname__}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    listened = module._forward_hooks
    if listened and idle is not None:
        listened = [hook for hook in listened.values() if not idle(hook, module)]
    if listened or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    weight = module._parameters.get("weight")
    if weight is not None and type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"has a weight that is {type(weight).__qualname__}"
    return None
