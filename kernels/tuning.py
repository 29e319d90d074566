"""Tile sizes, warps and stages as data: configs/<op>.json, read once, chosen by architecture, dtype and shape.

A row says for what it is and what to launch:

    {"kernel": "forward", "arch": 90, "itemsize": 2, "shape": {"head_dim": 64}, "config": {"BLOCK_M": 128, ...}}

`arch` (a key of `cards.ARCHS`), `itemsize` (bytes an element) and `shape` may be missing: the row then is for all. Of
the rows that are for the asked architecture, for those whose rows it takes (`cards.lineage`), or for all, the one with
the nearest shape is taken, and of equally near ones the architecture's own, then the item size's own; where there is
none, sm_80's. Numbers are as far apart as the octaves
between them, anything else that differs is half an octave, and a row without a shape is further than any with one: the
default. `python -m benchmarks tune` writes these files; nothing is timed in a run.

"candidates" in a row are configurations that a GPU has still to decide on: they compile without spills as what is
launched does, are in tests/golden, and `python -m benchmarks tune` times them with the neighbours of "config".

Where a kernel stands beside a vendor's product, "product" in a config says which is taken, "vendor" or "persistent";
what else is in it is the kernel's, and `{"product": "vendor"}` alone says that it does not ship.

Where ptxas lets a thread spill to reach a number of registers of its own choice, "maxnreg" in a config names the most
a thread may have instead.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2_fast.files import atomic_write

from .cards import Name, lineage

FOLDER = Path(__file__).parent / "configs"
SELECTORS = ("kernel", "arch", "itemsize", "shape")
KEYS = (*SELECTORS, "config", "candidates", "by")
FALLBACK_ARCH = 80  # asks for the least shared memory of those that have all rows
_POWERS = ("num_warps", "ROWS")  # beside BLOCK*: Triton wants powers of two
PRODUCTS = ("vendor", "persistent")


def path(op: str) -> Path:
    """Where the table of `op` is."""
    return FOLDER / f"{op}.json"


@functools.cache
def rows(op: str) -> list[dict[str, Any]]:
    """The rows of configs/<op>.json, checked.

    Raises ValueError, one line naming file and row, when the file is missing, is not JSON, or a row is malformed.
    """
    try:
        table = json.loads(path(op).read_text())
        found = table["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path(op)} is no table of configurations ({error}); {_fix(op)}") from None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path(op)} has no rows; {_fix(op)}")
    seen = set()
    for index, row in enumerate(found):
        problem = _problem(row)
        if problem is None:
            key = json.dumps([row.get(s) for s in SELECTORS], sort_keys=True)
            problem = "it is there twice" if key in seen else None
            seen.add(key)
        if problem is not None:
            raise ValueError(f"{path(op)}, row {index}: {problem}; {_fix(op)}")
    return found


def _fix(op: str) -> str:
    return f"restore the file, or write it again: python -m benchmarks tune --ops {op} --write"


def _problem(row: Any) -> str | None:
    """What is wrong with a row; None when nothing is."""
    if not isinstance(row, dict) or not isinstance(row.get("kernel"), str):
        return "it names no kernel"
    if unknown := row.keys() - set(KEYS):
        return f"{sorted(unknown)[0]!r} is not a key; a row has {', '.join(KEYS[:-1])} and {KEYS[-1]}"
    if not isinstance(candidates := row.get("candidates", []), list):
        return "candidates is no list of configurations"
    found = [
        _problem_of_config("config", row.get("config")),
        *(_problem_of_config("a candidate", c) for c in candidates),
    ]
    return next((problem for problem in found if problem), None)


def _problem_of_config(what: str, config: Any) -> str | None:
    if config == {"product": "vendor"}:
        return None
    if not isinstance(config, dict) or not isinstance(config.get("num_warps"), int):
        return f"{what} has no num_warps"
    for name, value in config.items():
        if name == "product":
            if value not in PRODUCTS:
                return f"product is {value!r}; choose {' or '.join(PRODUCTS)}"
            continue
        if type(value) is not int or value < 1:
            return f"{name} is {value!r}; it must be a whole number above 0"
        if (name.startswith("BLOCK") or name in _POWERS) and value & (value - 1):
            return f"{name} is {value}; it must be a power of two"
    return None


def _distance(row: dict[str, Any], shape: dict[str, Any]) -> float:
    """Octaves between a row's shape and the asked one."""
    if "shape" not in row:
        return math.inf
    total = 0.0
    for name, value in shape.items():
        own = row["shape"].get(name)
        numbers = type(own) is int and type(value) is int and own > 0 and value > 0
        total += abs(math.log2(own / value)) if numbers else 0.5 * (own != value)
    return total


@functools.cache
def _row(op: str, kernel: str, arch: Name, itemsize: int, shape: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    of_kernel = [r for r in rows(op) if r["kernel"] == kernel and r.get("itemsize", itemsize) == itemsize]
    for wanted in (lineage(arch), (FALLBACK_ARCH,)):
        order = [*wanted, None]
        if found := [r for r in of_kernel if r.get("arch") in order]:
            return min(
                found, key=lambda r: (_distance(r, dict(shape)), order.index(r.get("arch")), "itemsize" not in r)
            )
    raise ValueError(f"{path(op)} has no row for kernel {kernel!r} and {itemsize} bytes an element; {_fix(op)}")


def config(op: str, kernel: str, arch: Name, itemsize: int = 4, **shape: Any) -> dict[str, Any]:
    """Constexprs, num_warps and the other options of one launch; not to be changed. AMD's has no maxnreg.

    Args:
        arch: `aot.config_arch` of the device.
        itemsize: bytes an element.
        shape: what tells apart shapes that want configurations of their own, as the rows have it.
    """
    return _for_arch(_row(op, kernel, arch, itemsize, tuple(shape.items()))["config"], arch)


def candidates(op: str, kernel: str, arch: Name, itemsize: int = 4, **shape: Any) -> list[dict[str, int]]:
    """The candidates of the row that `config` takes; not to be changed."""
    found = _row(op, kernel, arch, itemsize, tuple(shape.items())).get("candidates", [])
    return [_for_arch(candidate, arch) for candidate in found]


def _for_arch(config: dict[str, int], arch: Name) -> dict[str, int]:
    if "maxnreg" in config and isinstance(arch, str):
        return {key: value for key, value in config.items() if key != "maxnreg"}
    return config


@contextlib.contextmanager
def trial(op: str, index: int, candidate: dict[str, Any]) -> Iterator[None]:
    """While it lasts, row `index` of `op` has another configuration: how tune tries candidates."""
    row = rows(op)[index]
    shipped, row["config"] = row["config"], candidate
    try:
        yield
    finally:
        row["config"] = shipped


def write(op: str, table: list[dict[str, Any]]) -> None:
    """Writes configs/<op>.json, a row a line; raises ValueError for a malformed row and then writes nothing."""
    for index, row in enumerate(table):
        if problem := _problem(row):
            raise ValueError(f"{op}, row {index}: {problem}")
    lines = ",\n".join("  " + json.dumps(row) for row in table)
    with atomic_write(path(op)) as temporary:
        temporary.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    rows.cache_clear()
    _row.cache_clear()
