"""python -m release.check v0.2.0 [--built]: what must hold before a release, each fault in one line.

The tag, the versions in pyproject.toml and gpt2_fast/__init__.py, and the newest heading of CHANGELOG.md are one; the
tag is new; the tree is clean, on main. --built: dist/ holds this version's source distribution and wheels, twine
accepts them, and the two commands that publish them are printed. Nothing is published here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def _found(root: Path, name: str, pattern: str) -> str:
    found = re.search(pattern, (root / name).read_text(), re.MULTILINE)
    return found[1] if found else "none"


def faults(root: Path, tag: str) -> Iterator[str]:
    """What stands against a release as `tag`, a line each."""
    version = _found(root, "pyproject.toml", r'^version = "(.+)"$')
    if tag != f"v{version}":
        yield f"the tag is {tag or 'not given'} and pyproject.toml's version is {version}: the tag must be v{version}"
    if (own := _found(root, "gpt2_fast/__init__.py", r'^__version__ = "(.+)"$')) != version:
        yield f"gpt2_fast.__version__ is {own} and pyproject.toml's version is {version}"
    if (newest := _found(root, "CHANGELOG.md", r"^## \[?([^\]\s]+)")) != version:
        yield f"CHANGELOG.md's newest heading is {newest}: it must be {version}, with the date of the release"
    if _git(root, "tag", "--list", tag):
        yield f"the tag {tag} exists: a release is never made twice"
    if (branch := _git(root, "branch", "--show-current")) != "main":
        yield f"the branch is {branch or 'none'}: releases are made from main"
    if changed := _git(root, "status", "--porcelain").splitlines():
        yield f"the tree is not clean: {len(changed)} files, {changed[0].split()[-1]} among them, are not committed"


def unfit(dist: Path, version: str) -> Iterator[str]:
    """What is wrong with the files to be published, a line each."""
    names = sorted(path.name for path in dist.glob("*")) if dist.is_dir() else []
    if others := [name for name in names if not name.startswith(f"gpt2_fast-{version}")]:
        yield f"{dist.name}/ holds {others[0]}, which is not of version {version}"
    for what, end in (("source distribution", ".tar.gz"), ("wheel", ".whl")):
        if not any(name.endswith(end) for name in names):
            yield f"{dist.name}/ holds no {what}: run make wheels"
    if bare := [name for name in names if name.endswith(".whl") and "manylinux" not in name]:
        yield f"{dist.name}/{bare[0]} is for this machine's libraries alone: run make wheels"
    if names:
        command = [sys.executable, "-m", "twine", "check", "--strict", *(str(dist / name) for name in names)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            yield f"twine check: {' '.join((done.stdout + done.stderr).split())}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m release.check", description=__doc__.split("\n")[0])
    parser.add_argument("tag")
    parser.add_argument("--built", action="store_true", help="look at dist/ too, and print the commands")
    a = parser.parse_args()
    found = list(faults(ROOT, a.tag))
    version = a.tag.removeprefix("v")
    if a.built:
        found += unfit(ROOT / "dist", version)
    for line in found:
        print(f"release: {line}", file=sys.stderr)
    if a.built and not found:
        print(f"git tag -a {a.tag} -m 'gpt2_fast {version}' && git push origin {a.tag}\ntwine upload dist/*")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
