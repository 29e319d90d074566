"""The C++ kernels by name: ``cpp.attention_forward(out, a)`` takes what the kernel's parameters name from out and a.

csrc/kernels.h lists the kernels and their parameters; the extension reads them from there. Of several sources the first
that has a name counts, and keyword arguments go before all of them. A tensor that is not on the CPU, not contiguous or
not of the dtype that the list says raises TypeError: no kernel reads what it was not given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpt2_fast.ops.runtime import dispatch


def __getattr__(name: str) -> Callable[..., None]:
    kernel = getattr(dispatch.extension(), name)

    def call(*sources: object, **own: object) -> None:
        kernel(own, *[s if type(s) is dict else s.named() for s in sources])

    call.__name__, call.__doc__ = name, kernel.__doc__
    globals()[name] = call
    return call


def pack(kernel: str, *sources: object, **own: object) -> bytes:
    """The arguments of `kernel` as one struct of 8 bytes each, for the CUDA kernel that takes the same."""
    return dispatch.extension().pack(kernel, own, *[s if type(s) is dict else s.named() for s in sources])


# What a pointer to each type may point at.
_POINTED = {"float*": torch.float32, "int8_t*": torch.int8, "int32_t*": torch.int32}


def struct(name: str, **members: Tensor | Sequence[int] | int | None) -> list[int]:
    """One of csrc's structs as 8-byte integers in the order of its members: {tensor: its address, None: 0}.

    A member that is a struct itself is what this function made of it. Raises TypeError for a member that is missing,
    unknown, or not of its type: a tensor that is not on the CPU, not contiguous, or of another dtype.
    """
    structs = dispatch.extension().STRUCTS
    layout = structs[name]
    if differing := members.keys() ^ {member for member, _ in layout}:
        raise TypeError(f"{name}: {', '.join(sorted(differing))} is missing or no member of it")
    entries: list[int] = []
    for member, kind in layout:
        value = members[member]
        if kind in structs:
            entries += value
        elif kind == "int64_t":
            entries.append(int(value))
        else:
            entries.append(0 if value is None else _address(f"{name}: {member}", value, _POINTED.get(kind)))
    return entries


def _address(what: str, t: Tensor, dtype: torch.dtype | None) -> int:
    if not t.is_cpu or not t.is_contiguous() or (dtype is not None and t.dtype != dtype):
        raise TypeError(f"{what} must be contiguous, on the CPU{f' and of {dtype}' if dtype else ''}")
    return t.data_ptr()
