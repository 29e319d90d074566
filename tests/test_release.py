"""`make release`: each check fails in one line. In a git repository of its own, with files like this one's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from release import check

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "pyproject.toml": '[project]\nname = "gpt2_fast"\nversion = "0.2.0"\n',
    "gpt2_fast/__init__.py": '__version__ = "0.2.0"\n',
    "CHANGELOG.md": "# Changelog\n\n## 0.2.0 - 2026-12-01\n\n### Added\n\n## 0.1.0 - 2026-01-01\n",
}


def _git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@x", *arguments], cwd=root, check=True,
                   capture_output=True)  # fmt: skip


@pytest.fixture
def repository(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    _git(tmp_path, "init", "-q", "-b", "main")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def _edit(root: Path, name: str, before: str, after: str) -> None:
    path = root / name
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    _git(root, "commit", "-qam", "changed")


def test_a_repository_that_is_ready(repository):
    assert list(check.faults(repository, "v0.2.0")) == []


@pytest.mark.parametrize(
    ("name", "before", "after", "line"),
    [
        ("pyproject.toml", 'version = "0.2.0"', 'version = "0.3.0"',
         "the tag is v0.2.0 and pyproject.toml's version is 0.3.0: the tag must be v0.3.0"),
        ("gpt2_fast/__init__.py", "0.2.0", "0.1.0",
         "gpt2_fast.__version__ is 0.1.0 and pyproject.toml's version is 0.2.0"),
        ("CHANGELOG.md", "## 0.2.0", "## Unreleased\n\n## 0.2.0",
         "CHANGELOG.md's newest heading is Unreleased: it must be 0.2.0, with the date of the release"),
    ],
)  # fmt: skip
def test_versions_that_differ(name, before, after, line, repository):
    _edit(repository, name, before, after)
    assert line in list(check.faults(repository, "v0.2.0"))


def test_tag_branch_and_tree(repository):
    assert next(check.faults(repository, "")).startswith("the tag is not given and pyproject.toml's version is 0.2.0")
    _git(repository, "tag", "v0.2.0")
    _git(repository, "switch", "-qc", "other")
    (repository / "left.txt").touch()
    assert list(check.faults(repository, "v0.2.0")) == [
        "the tag v0.2.0 exists: a release is never made twice",
        "the branch is other: releases are made from main",
        "the tree is not clean: 1 files, left.txt among them, are not committed",
    ]


def test_files_that_are_not_to_be_published(tmp_path):
    assert list(check.unfit(tmp_path / "dist", "0.2.0")) == [
        "dist/ holds no source distribution: run make wheels", "dist/ holds no wheel: run make wheels"
    ]  # fmt: skip
    (tmp_path / "dist").mkdir()
    for name in ("gpt2_fast-0.1.0.tar.gz", "gpt2_fast-0.2.0-cp310-abi3-linux_x86_64.whl"):
        (tmp_path / "dist" / name).touch()
    found = list(check.unfit(tmp_path / "dist", "0.2.0"))
    assert found[0] == "dist/ holds gpt2_fast-0.1.0.tar.gz, which is not of version 0.2.0"
    assert found[1] == (
        "dist/gpt2_fast-0.2.0-cp310-abi3-linux_x86_64.whl is for this machine's libraries alone: run make wheels"
    )
    assert found[2].startswith("twine check: ")
    assert all("\n" not in line for line in found)


def test_this_repositorys_files_are_read(tmp_path):
    """The patterns fit pyproject.toml, __init__.py and CHANGELOG.md as they are written here."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    _git(tmp_path, "init", "-q", "-b", "main")
    lines = "\n".join(check.faults(tmp_path, "v"))
    assert "none" not in lines, lines
    assert "__version__" not in lines, lines
