"""How much memory a process may still take here, without torch: the system's, and what its control group leaves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Of control groups in version 2 and 1: the limit, what is used, and in memory.stat what a limit would take back first.
_GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes that a process may still take; None where the system does not say. root: where proc and sys are mounted."""
    root = Path(root)
    known = [n for n in (_system(root), *_groups(root)) if n is not None]
    return min(known, default=None)


def _system(root: Path) -> int | None:
    """MemAvailable of Linux; elsewhere all of the machine's memory, the most that it can be."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a system without these names
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _groups(root: Path) -> Iterator[int]:
    """What each control group of this process leaves: its own and all above, whose limits hold as well."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if base != group and base not in group.parents:
                break
            for names in _GROUP_FILES:
                if (left := _left(group, *names)) is not None:
                    yield left


def _left(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(stat.get(reclaimable, 0))
    return max(0, most - used)
