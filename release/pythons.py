"""The Pythons that are supported, and where this machine has them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def interpreter(python: str) -> str | None:
    """This Python's executable, with pip: on PATH, or among pyenv's versions; None where there is none."""
    candidates = [shutil.which(f"python{python}") or ""]
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.strip()
        candidates += map(str, sorted(Path(root, "versions").glob(f"{python}.*/bin/python")))
    for candidate in filter(None, candidates):  # a shim of pyenv's answers only for a version that is switched on
        if subprocess.run([candidate, "-m", "pip", "--version"], capture_output=True).returncode == 0:
            return candidate
    return None
