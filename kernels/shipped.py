"""Every configuration that the kernel files ship, and what its machine code says.

`gpt2-fast doctor --kernels` prints these reports; tests/golden/kernels.py keeps them, so that a change of the machine
code is seen. A job names a configuration by its place and not by its kernel, because worker processes compile it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from typing import Any, NamedTuple

from . import aot, cards

_DTYPE = re.compile(r" (?=fp32|bf16|fp16|C=)")  # what comes before it in a configuration's name is the kernel


class Job(NamedTuple):
    """One compilation: spec `index` of `aot_specs()` in kernels/<stem>.py for the architecture `arch`."""

    stem: str
    index: int
    arch: cards.Name


def stems() -> list[str]:
    """The files in kernels/ that ship Triton kernels."""
    package = importlib.import_module(__package__)
    found = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [stem for stem in found if hasattr(_module(stem), "aot_specs")]


def _module(stem: str) -> Any:
    return importlib.import_module(f"{__package__}.{stem}")


@functools.cache
def _specs(stem: str) -> list[aot.AotSpec]:
    return _module(stem).aot_specs()


def jobs(archs: tuple[cards.Name, ...] = aot.ARCHS, quick: bool = False) -> list[Job]:
    """Every configuration for each of `archs` that it ships for; quick: one of each kernel, bfloat16 if it has that."""
    found: dict[tuple, Job] = {}
    for stem in stems():
        for index, spec in enumerate(_specs(stem)):
            for arch in set(spec.archs) & set(archs):
                key = (_DTYPE.split(spec.name)[0], arch) if quick else (stem, index, arch)
                if key not in found or "bf16" in spec.name:
                    found[key] = Job(stem, index, arch)
    return sorted(found.values())


def spec(job: Job) -> aot.AotSpec:
    return _specs(job.stem)[job.index]


def report(job: Job) -> tuple[str, cards.Name, dict[str, Any] | None, str]:
    """Compiles one job: (the configuration's name, arch, report of `aot.inspect` or None, error or "")."""
    given = spec(job)
    try:
        return given.name, job.arch, aot.inspect(aot.compile_spec(given, job.arch)), ""
    except Exception as error:
        return given.name, job.arch, None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
