"""Running from the source tree: where the package's parts are, and whether the extension fits the sources.

setup.py runs this file too, so nothing but the standard library is imported.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).resolve().parent.parent / "csrc"

NOTE = "no_extension.txt"  # what setup.py leaves in the package where it built no extension: why, in one line


def why_no_extension(path: Iterable[str]) -> str | None:
    """What the note says in one of the package's folders (its ``__path__``); None where there is none."""
    for note in (Path(folder) / NOTE for folder in path):
        if note.exists():
            return note.read_text().strip()
    return None


def source_hash(folder: Path = CSRC) -> str:
    """One hash of all C++ and CUDA sources in `folder`, which setup.py compiles into the extension."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".cpp", ".cu", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def warn_if_stale(extension: ModuleType, folder: Path = CSRC) -> None:
    """Warns when `extension` was built from other sources than `folder` holds; there is none where it is installed."""
    if (folder / "bindings.cpp").exists() and source_hash(folder) != extension.SOURCE_HASH:
        warnings.warn(
            f"{extension.__file__} was built from other sources than {folder}; "
            "build it again: pip install -e . (or pip install .)",
            RuntimeWarning,
            stacklevel=2,
        )


def extend_path(path: list[str]) -> None:
    """Lets the source tree's gpt2_fast folder find its other parts, given the package's ``__path__``.

    Python started in the repository root imports this folder, installed or not. The Triton kernels then lie beside
    it in kernels/, and the extension, unless it was built in place (pip install -e), in the installed package.
    """
    here = Path(__file__).resolve().parent
    if (here / "kernels").exists():
        return
    path.append(str(here.parent))
    if any(here.glob("_C.*")):
        return
    for entry in sys.path:
        folder = Path(entry or ".").resolve() / "gpt2_fast"
        if folder != here and any(folder.glob("_C.*")):
            path.append(str(folder))
            return
