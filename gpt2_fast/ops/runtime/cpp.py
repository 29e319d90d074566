"""The C++ kernels by name: ``cpp.attention_forward(out, a)`` takes what the kernel's parameters name from out and a.

csrc/kernels.h lists the kernels and their parameters; the extension reads them from there. Of several sources the first
that has a name counts, and keyword arguments go before all of them. A tensor that is not on the CPU, not contiguous or
not of the dtype that the list says raises TypeError: no kernel reads what it was not given.
"""

from __future__ import annotations

from collections.abc import Callable

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
