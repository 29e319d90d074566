"""Machines without a compiler, macOS, Windows: what setup.py says and leaves, and what the package does without _C."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from gpt2_fast.ops.runtime import dispatch

ROOT = Path(__file__).resolve().parent.parent
WHY = "no C++ compiler (g++) was found; install g++, or name another one by CXX"


@pytest.fixture
def lacking(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    return lambda: setup["lacking"](setup["compiler"]())


def _compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_what_a_machine_lacks(lacking, tmp_path, monkeypatch):
    assert lacking() is None
    monkeypatch.setenv("CXX", _compiler(tmp_path, 'case "$*" in *-fopenmp*) echo "error: no omp.h" >&2; exit 1;; esac'))
    assert "compiler does not compile for it (error: no omp.h); install g++ 9" in lacking()
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "fatal error: Python.h" in lacking()
    assert "(python3-dev)" in lacking()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lacking() == WHY.replace("g++)", "c++)")


@pytest.mark.parametrize(("name", "system"), [("darwin", "Darwin"), ("win32", "Windows")])
def test_other_systems_are_not_tried(name, system, lacking, monkeypatch):
    monkeypatch.setenv("CXX", "g++")  # not looked for: shutil would ask that system where
    monkeypatch.setattr(sys, "platform", name)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(subprocess, "run", None)
    assert lacking() == f"it is built on Linux alone, and this is {system}"


def _build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
                          timeout=120, start_new_session=True)  # fmt: skip


def test_an_installation_without_a_compiler(tmp_path):
    """It succeeds, with one line and a note, and takes nothing along that an earlier build has left."""
    package = tmp_path / "gpt2_fast"
    package.mkdir()
    for name in ("_C.abi3.so", "_C.cpython-310-x86_64-linux-gnu.so", "embedding.fatbin"):
        (package / name).touch()
    required = _build(tmp_path, CXX="none", GPT2_FAST_REQUIRE_EXTENSION="1")
    why = WHY.replace("g++)", "none)")
    assert required.returncode == 1
    assert required.stderr.splitlines()[-1] == (
        f"gpt2_fast: GPT2_FAST_REQUIRE_EXTENSION=1, and the C++ extension cannot be built: {why}"
    )
    done = _build(tmp_path, CXX="none", GPT2_FAST_REQUIRE_EXTENSION="0")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "gpt2_fast:" in line] == [
        f"gpt2_fast: installed without its C++ extension, plain PyTorch runs in place of its kernels: {why}"
    ]
    assert {path.name: path.read_text() for path in package.iterdir()} == {"no_extension.txt": why + "\n"}


def test_a_compiler_that_fails_is_an_error(tmp_path):
    """Nobody whose compiler ran out of memory gets the slow package unasked."""
    pytest.importorskip("ninja", reason="ninja is a build dependency, not installed here")
    compiler = _compiler(tmp_path, 'case "$*" in *probe.so*) exit 0;; esac; exit 1')
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("build", ".git", "*.so", "__pycache__", "results", ".venv")
    shutil.copytree(ROOT, tree, ignore=ignored)
    environment = os.environ | {"CXX": compiler, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "gpt2_fast: the C++ extension did not build, see the messages above" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("libgomp.so.1: cannot open shared object file", r"finds no OpenMP, .*; install libgomp1$"),
        ("undefined symbol: PyNew", r"does not load \(undefined symbol: PyNew\); install gpt2_fast again"),
    ],
)
def test_an_extension_that_does_not_load(error, said, monkeypatch):
    def fails():
        raise ImportError(error)

    monkeypatch.setattr(dispatch, "extension", fails)
    assert re.search(said, dispatch._extension_missing.__wrapped__())


CODE = """
import glob, os, sys, warnings
sys.path[:] = [TREE] + [p for p in sys.path if not glob.glob(os.path.join(p, "gpt2_fast", "_C.*"))]
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
import torch
from gpt2_fast import AdamW, GPT2Config, GPT2LMHeadModel
from gpt2_fast.cli import main
model = GPT2LMHeadModel(GPT2Config.from_preset("nano"))
optimizer = AdamW(model.parameters(), lr=1e-3)
ids = torch.randint(100, (2, 16))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
print("falls", losses[0] > losses[1] > losses[2])
print("warned", [str(w.message) for w in caught if "C++" in str(w.message)])
try:
    GPT2LMHeadModel(GPT2Config.from_preset("nano"), impl="cpp")(ids)
except RuntimeError as error:
    print("named", error)
main(["doctor"])
"""


def test_the_package_without_its_extension(tmp_path):
    """It trains on the reference, warns once, says so in doctor, and an implementation that is asked for raises."""
    for name in ("gpt2_fast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "gpt2_fast" / "no_extension.txt").write_text(WHY + "\n")
    code = CODE.replace("TREE", repr(str(tmp_path)))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason = (f"this was installed without the C++ extension: {WHY}; then install gpt2_fast again with: "
              "pip install --force-reinstall --no-deps --no-cache-dir")  # fmt: skip
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines()[:3])
    assert said["falls"] == "True"
    assert said["warned"] == str([f"plain PyTorch runs in place of the C++ kernels: {reason}"])
    assert said["named"].endswith(f"impl='cpp' cannot run: {reason}")
    doctor = done.stdout.splitlines()[3:]
    assert next(line for line in doctor if line.startswith("extension ")).endswith(reason)
    assert any(line.split() == ["attention", "reference"] for line in doctor)
