"""Whether a call has to go through torch's dispatcher.

Otherwise it goes to its body without it: the dispatcher would find the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

ORDINARY = {Tensor, Parameter}
PLAIN = "use impl='reference', or gpt2_fast.unpatch(model) of a patched model"  # which derivatives of all kinds take


def under_a_tracer() -> bool:
    """Whether something looks at operators as they are called: a compiler, a transform, a mode, a profiler, a trace."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled():
        return True
    return torch._C._is_tracing()  # torch.jit.trace, whose sizes are tensors


def is_odd(t: Tensor) -> bool:
    """Whether `t` is more than its memory says: of a class of its own, negated lazily, or zeros that have none."""
    return type(t) not in ORDINARY or t.is_neg() or t._is_zerotensor()


def traced(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call with `tensors` has to go through the dispatcher."""
    return under_a_tracer() or any(t is not None and is_odd(t) for t in tensors)


def several_at_once(tensors: Sequence[Tensor | None]) -> bool:
    """Whether one of these stands for many, without memory of its own: within torch.func.vmap, or for autograd.

    autograd makes such upstream gradients by itself, by is_grads_batched=True and jacobian(..., vectorize=True).
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return any([t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors])  # noqa: C419


def refuse_tangents(name: str, tensors: Sequence[Tensor | None]) -> None:
    """Raises RuntimeError where forward-mode autograd follows one of `tensors`: no kernel does, and it is lost."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise tangent(name)


def tangent(name: str) -> RuntimeError:
    """The error, one line, for forward-mode autograd of the operation `name`."""
    return RuntimeError(f"{name}: an input has a tangent, and its kernels have no forward-mode derivative; {PLAIN}")
