"""The names that a package exports, imported when they are first asked for: `--help` imports no torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def exports(
    package: str, names: Mapping[str, Iterable[str]], modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package (PEP 562).

    names: exported names by the module that defines them, its dotted name below the package. No name may be that of
        a module of the package: whichever was imported last would win.
    modules: modules that are attributes of the package too, with no import statement.
    """
    homes = {name: f"{package}.{module}" for module, listed in names.items() for name in listed}
    whole = frozenset(modules)

    def __getattr__(name: str) -> Any:
        if name in whole:
            return importlib.import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *whole})

    return __getattr__, __dir__, list(homes)
