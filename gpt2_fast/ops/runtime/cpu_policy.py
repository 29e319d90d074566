"""Who multiplies matrices on this CPU.

The best choice differs between processors, so it is made from the processor's name and features, never from a timing:
the same machine always gives the same bits.

* AMD with AVX-512: this package's own product (`csrc/linear.cpp`) for MIN_ROWS rows or more, oneDNN below.
* Intel: MKL; with AMX bfloat16 goes to the own product, MIN_ROWS rows or more. Other processors: MKL where torch has
  it, else oneDNN.
* bfloat16 is multiplied as it is where that is twice as fast as float32 (AMX, or AVX-512 BF16 on AMD); elsewhere both
  sides are widened to float32, multiplied there and the result is rounded once.
* float16 is always widened.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass

import torch

MIN_ROWS = 32  # below, packing the other side costs more than the product
LIBRARIES = ("cpp", "onednn", "mkl")


@dataclass(frozen=True)
class CpuPolicy:
    """How products run on this CPU.

    float32: the vendor library of float32 products. native_bfloat16: whether bfloat16 is multiplied as it is.
    reason: in words. own: whether this package's own product goes before the vendor's. own_tiles: whether it does so in
    bfloat16 where it multiplies in AMX's tile registers, which takes a kernel that hands them out and a compiler that
    knows them: its instruction set in use is "amx" then.
    """

    float32: str
    native_bfloat16: bool
    reason: str
    own: bool = False
    own_tiles: bool = False

    def takes_own(self, dtype: torch.dtype, isa: str) -> bool:
        """Whether products of `dtype` are this package's own where `isa` is its instruction set."""
        return self.own or (self.own_tiles and dtype == torch.bfloat16 and isa == "amx")

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What matrices of `dtype` are multiplied in."""
        return torch.bfloat16 if dtype == torch.bfloat16 and self.native_bfloat16 else torch.float32


def _vendor_and_flags() -> tuple[str, frozenset[str]]:
    vendor, flags = platform.machine(), frozenset()
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "vendor_id":
                    vendor = value.strip()
                elif key.strip() in ("flags", "Features"):
                    flags = frozenset(value.split())
                    break
    except OSError:
        pass
    return vendor, flags


@functools.cache
def cpu_policy() -> CpuPolicy:
    """The policy for this processor; GPT2_FAST_GEMM=cpp, onednn or mkl overrides who multiplies."""
    vendor, flags = _vendor_and_flags()
    amd = vendor == "AuthenticAMD"
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    library = "onednn" if has_onednn and (amd or not torch.backends.mkl.is_available()) else "mkl"
    own = amd and "avx512f" in flags
    amx, avx512_bf16 = "amx_bf16" in flags, "avx512_bf16" in flags
    own_tiles = amx
    chosen = os.environ.get("GPT2_FAST_GEMM")
    if chosen is not None:
        if chosen not in LIBRARIES:
            raise ValueError(f"GPT2_FAST_GEMM is {chosen!r}; set it to {', '.join(LIBRARIES)}, or unset it")
        own = own_tiles = chosen == "cpp"
        library = library if own else chosen
    native = amx or (avx512_bf16 and amd)
    why = "AMX" if amx else "AVX-512 BF16" if native else "no bfloat16 products faster than float32"
    return CpuPolicy(library, native, f"{vendor}, {why}", own, own_tiles)
