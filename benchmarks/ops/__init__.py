"""`python -m benchmarks ops [--out FOLDER] [pytest options]`: the per-op table, its JSON and its chart."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.measure import RESULTS, ROOT


def main(argv: list[str]) -> int:
    """Runs `pytest benchmarks` with --results set to --out, benchmarks/results unless given; its exit status."""
    import pytest

    argv, out = list(argv), str(RESULTS)
    if "--out" in argv:
        at = argv.index("--out")
        if at + 1 == len(argv):
            sys.exit("--out wants a folder")
        out = str(Path(argv[at + 1]).resolve())
        del argv[at : at + 2]
    paths = [word for word in argv if word.endswith(".py")] or [str(ROOT / "benchmarks")]
    return pytest.main([*paths, *(word for word in argv if word not in paths), "--results", out])
