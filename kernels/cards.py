"""The cards: for each architecture what its limits are, whose configurations it takes, and whether it has ever run.

ARCHS is the one table. What compiles (`aot`), what is chosen (`tuning`), what may run (`refusal`, which
gpt2_fast/ops/runtime/dispatch.py asks) and what `gpt2-fast doctor` says of a card are read from it. Imports no Triton.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

Name = int | str  # a compute capability times ten, or AMD's gfx name

INTERPRETER = 0  # the architecture of a CPU tensor: Triton's interpreter


class Arch(NamedTuple):
    """One architecture.

    cards: what is sold with it.
    shared: bytes of shared memory (AMD: LDS) that one block may have.
    base: whose configurations it takes where it has none of its own.
    bfloat16: whether its Triton kernels compile in bfloat16.
    ran: the card that has run the kernels; "" means that they were compiled for it and never ran.
    """

    cards: str
    shared: int
    base: Name
    bfloat16: bool = True
    ran: str = ""


# Shared memory: CUDA C++ Programming Guide, "Technical Specifications"; LDS: AMD's CDNA2 and CDNA3 ISA references.
ARCHS: dict[Name, Arch] = {
    75: Arch("T4, RTX 20, GTX 16", 64 << 10, 80, bfloat16=False),
    80: Arch("A100, A30", 163 << 10, 80),
    86: Arch("RTX 30, A10, A40, RTX A6000", 99 << 10, 80),
    89: Arch("RTX 40, L4, L40, L40S", 99 << 10, 80),
    90: Arch("H100, H200, GH200", 227 << 10, 90, ran="NVIDIA H200, 2026-11-26"),
    100: Arch("B200, GB200, B300", 227 << 10, 100),
    120: Arch("RTX 50, RTX PRO Blackwell", 99 << 10, 80),
    "gfx90a": Arch("MI200 (MI210, MI250)", 64 << 10, "gfx942"),
    "gfx942": Arch("MI300A, MI300X, MI325X", 64 << 10, 80),
}
# A newer NVIDIA card compiles sm_120's configurations for itself: they ask for the least shared memory of all since
# sm_80 and for no instruction of one architecture.
NEWEST = 120


def label(arch: Name) -> str:
    """sm_90, gfx942."""
    return arch if isinstance(arch, str) else f"sm_{arch}"


def named(text: str) -> Name:
    """The architecture that `text` names: 90, sm_90 or gfx942. Raises ValueError for one that is not in ARCHS."""
    known = {str(arch): arch for arch in ARCHS}
    if (name := text.removeprefix("sm_")) not in known:
        raise ValueError(f"no architecture {text!r}; choose of {', '.join(known)}")
    return known[name]


def lineage(arch: Name) -> tuple[Name, ...]:
    """An architecture and those whose configurations stand in for what it has none of, nearest first."""
    found = [arch]
    while found[-1] in ARCHS and ARCHS[found[-1]].base not in found:
        found.append(ARCHS[found[-1]].base)
    return tuple(found)


def history(arch: Name) -> str:
    """Whether the kernels have ever run on an architecture, in words."""
    ran = ARCHS[arch].ran
    return f"have run on {ran}" if ran else "compiled, and never run on this card"


def of_capability(major: int, minor: int) -> int | None:
    """The row of ARCHS of an NVIDIA card; None where it is older than all of them."""
    if (major, minor) < (7, 5):
        return None
    if major == 8:
        return 80 if minor == 0 else 89 if minor == 9 else 86  # 8.7, Jetson Orin, has more of everything than 8.6
    return {7: 75, 9: 90, 10: 100}.get(major, NEWEST)


def of_gfx(name: str) -> str | None:
    """The row of ARCHS of an AMD card by its gcnArchName ("gfx942:sramecc+:xnack-"); None for every other card."""
    arch = name.partition(":")[0]
    return arch if arch in ARCHS else None


@functools.cache
def of_device(index: int | None) -> tuple[Name | None, str]:
    """The row of ARCHS of a CUDA or ROCm device, None where it has none, and what to call the card.

    ROCm reports a capability of its own counting, 9.x for MI200 and MI300: AMD's cards go by their gfx name.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if torch.version.hip is not None:
        gfx = properties.gcnArchName.partition(":")[0]
        return of_gfx(gfx), f"{properties.name} ({gfx})"
    major, minor = properties.major, properties.minor
    return of_capability(major, minor), f"{properties.name} (sm_{major}{minor})"


def refusal(index: int | None, dtype: torch.dtype | None = None) -> str | None:
    """Why the kernels do not run on a device, in `dtype`, with the fix; None where they do.

    dtype: None asks of the card alone.
    """
    arch, card = of_device(index)
    if arch is None:
        known = ", ".join(label(a) for a in ARCHS)
        return f"{card} is not supported: the kernels are for {known}; use plain PyTorch, impl='reference'"
    if dtype == torch.bfloat16 and not ARCHS[arch].bfloat16:
        return f"{card} has no bfloat16: use float16 or float32, or plain PyTorch, impl='reference'"
    return None


def describe(index: int) -> str:
    """Which configurations a device takes and whether they have ever run there, or why none: one line."""
    if reason := refusal(index):
        return reason
    arch = of_device(index)[0]
    half = "" if ARCHS[arch].bfloat16 else "; float32 and float16, no bfloat16"
    return f"those of {label(arch)}{half}; {history(arch)}"
