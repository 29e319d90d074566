"""Modules that a fused operation stands for: when it may read their weights, and when it must call them.

State of the process: `_FORWARDS`, the forward that each class had when it was first seen here.
"""

from __future__ import annotations

import contextlib
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


def version_of(tensor: Tensor) -> int | None:
    """How often it was changed in place; None of an inference tensor, which counts nothing, and in torch.compile."""
    if torch.compiler.is_compiling() or not isinstance(tensor, Tensor) or tensor.is_inference():
        return None  # no tensor: what somebody's tree_map left in its place
    return tensor._version


def has_changed(tensor: Tensor, version: int | None) -> bool:
    """Whether it was changed in place since `version_of` said `version`; an inference tensor's changes are not seen."""
    return version is not None and tensor._version != version


def hidden_changed(whose: str) -> RuntimeError:
    """The error, one line that begins with `whose`, for hidden states that logits can no longer be computed from."""
    return RuntimeError(
        f"{whose}: the hidden states have changed since this output was computed, in place; read .logits before that, "
        "or call the model again"
    )


SAMPLED = 256  # rows of a head, at most


def _sample(weight: Tensor) -> Tensor | None:
    """A number each of rows of weight [V, C], evenly apart, the last among them: a copy where the weight is.

    Two views and a copy, as every training step makes one: `generate.decoders` looks closer at what it packs. None
    where no numbers are at hand: in an export, of meta and fake tensors, within torch.func's transforms and where a
    mode sees each operator (make_fx), and while a CUDA graph is captured, which a later look would have to wait for.
    """
    if torch.compiler.is_exporting() or weight.is_meta or weight.numel() == 0:
        return None
    if not torch.compiler.is_compiling():
        if type(weight) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return None
        if torch._C._len_torch_dispatch_stack():
            return None
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
    V, C = weight.shape
    step = -(-V // min(V, C, SAMPLED))
    return weight.detach()[(V - 1) % step :: step].diagonal().clone(memory_format=torch.contiguous_format)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two vectors hold the same bits: a NaN is itself."""
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Seen:
    """The weight of a head in one forward pass, which logits that are computed later must find as it was.

    It is known by its version counter and its address, and by a sample of its numbers: a write through `.data` or a raw
    pointer moves no counter, and in torch.compile there is none. Such a write of single rows may not be seen.

    sharded: whether `fully_shard` manages it. It then puts other values into the same memory in every pass, which no
    version counter shows, so the passes of the head are counted.
    """

    def __init__(self, head: nn.Module, sharded: bool = False):
        compiling = torch.compiler.is_compiling()
        self.head, self.weight = head, head.weight
        self.version = version_of(self.weight)
        self.grad = None if compiling else (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        # A sharded weight lies elsewhere in every pass, and is found by its count.
        self.place = None if compiling or sharded else self._place()
        self.sample, self.sharded = None, sharded
        self.call = None
        if sharded and not compiling:
            self.call = head.__dict__["_passes"] = head.__dict__.get("_passes", 0) + 1

    def _place(self) -> tuple | None:
        """Where the weight lies; None of one that has no memory, as within torch.func's transforms."""
        try:
            return self.weight.shape, self.weight.dtype, self.weight.device, self.weight.data_ptr()
        except RuntimeError:
            return None

    def sampled(self) -> Seen:
        """This, for logits that are computed after the call: those within it need no look, and a GPU no wait."""
        self.sample = None if self.sharded else _sample(self.weight)
        return self

    def _has_moved(self) -> bool:
        known = self.place is not None and not torch.compiler.is_compiling()
        return known and self._place() not in (None, self.place)

    def _has_other_numbers(self) -> bool:
        """Waits for a GPU, as logits are read once."""
        if self.sample is None or torch.compiler.is_compiling():
            return False
        now = _sample(self.weight)
        return now is not None and not _same_bits(now, self.sample)

    def mode(self) -> contextlib.ExitStack:
        """Within it gradients are on or off as they were in the forward pass, wherever the logits are asked for."""
        modes = contextlib.ExitStack()
        if self.grad is not None and not torch.compiler.is_compiling():
            inference, grad = self.grad
            if inference != torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(inference))
            if grad != torch.is_grad_enabled():
                modes.enter_context(torch.set_grad_enabled(grad))
        return modes

    def check(self, whose: str) -> None:
        """Raises RuntimeError, one line that begins with `whose`, where the weight is another one now."""
        if hasattr(self.head.weight, "device_mesh") and not hasattr(self.weight, "device_mesh"):
            raise RuntimeError(
                f"{whose}: the head is sharded again since this output was computed; read .logits before backward with "
                "reshard_after_forward=False, or under torch.no_grad(), or call the model without labels"
            )
        if self._has_moved() or has_changed(self.weight, self.version) or self._has_other_numbers():
            raise RuntimeError(
                f"{whose}: the head has changed since this output was computed, by an optimizer step perhaps; read "
                ".logits before the step, or call the model again"
            )
        if self.call is not None and self.head.__dict__["_passes"] != self.call:
            raise RuntimeError(
                f"{whose}: the sharded model was called again since this output was computed; read .logits before that"
            )
