"""The pins in constraints.txt: they fit each other, and each supported Python gets them from the package index."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release.pythons import PYTHONS, interpreter

ROOT = Path(__file__).resolve().parents[1]
# Requires-Dist of torch's wheels on the package index (Linux, x86-64). A CPU build of torch requires neither, so the
# metadata of the torch that runs the tests may say nothing of them.
TORCH_NEEDS = {
    "2.11.0": {"triton": "3.6.0", "nvidia-cuda-nvrtc": "13.0.88"},
    "2.12.0": {"triton": "3.7.0", "nvidia-cuda-nvrtc": "13.0.88"},
    "2.12.1": {"triton": "3.7.1", "nvidia-cuda-nvrtc": "13.0.88"},
    "2.13.0": {"triton": "3.7.1", "nvidia-cuda-nvrtc": "13.0.88"},
    "2.14.0": {"triton": "3.8.0", "nvidia-cuda-nvrtc": "13.0.88"},
    "2.14.1": {"triton": "3.8.0", "nvidia-cuda-nvrtc": "13.0.88"},
    "2.15.0": {"triton": "3.9.0", "nvidia-cuda-nvrtc": "13.2.86"},
}
# What uv says when it reached no index; a resolution that fails says "No solution found" of packages that it read.
UNREACHABLE = re.compile(
    r"error sending request|dns error|operation timed out|network was disabled|HTTP status server error", re.I
)


def _pins(python: str) -> dict[str, str]:
    """Name -> version of each pin that holds for this Python on Linux; a name pinned twice fails."""
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not (line := line.split("#")[0].strip()):
            continue
        pin = Requirement(line)
        environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
        if pin.marker is None or pin.marker.evaluate(environment):
            name, (specifier,) = canonicalize_name(pin.name), pin.specifier
            assert specifier.operator == "==", line
            assert name not in pins, f"{name} is pinned twice for Python {python}"
            pins[name] = specifier.version
    return pins


@pytest.mark.parametrize("python", PYTHONS)
def test_each_python_has_every_pin_and_torch_what_it_needs(python):
    pins = _pins(python)
    assert pins.keys() == _pins("3.12").keys()
    assert pins["torch"] in TORCH_NEEDS, "add to TORCH_NEEDS what this torch requires (its wheel's METADATA)"
    for name, version in TORCH_NEEDS[pins["torch"]].items():
        assert pins[name] == version, f"torch {pins['torch']} requires {name} {version}"


def test_what_is_installed_accepts_the_pins():
    """What a pinned package says of another one, from the metadata at hand, where it is installed as pinned."""
    pins, asked = _pins(f"{sys.version_info[0]}.{sys.version_info[1]}"), 0
    for name, version in pins.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.version.split("+")[0] != version:
            continue
        for requirement in map(Requirement, installed.requires or []):
            pinned = pins.get(canonicalize_name(requirement.name))
            if pinned and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                assert requirement.specifier.contains(pinned), f"{name} {version} requires {requirement}, not {pinned}"
                asked += 1
    assert asked > 5  # peft, accelerate and transformers alone name more


@pytest.fixture(scope="module")
def resolutions(tmp_path_factory):
    """`uv pip compile` for every Python, all started at once: metadata alone is read, and no interpreter is needed."""
    folder = tmp_path_factory.mktemp("resolutions")
    (folder / "torch.in").write_text("torch\n")
    uv = Path(sys.executable).parent / "uv"
    command = [str(uv) if uv.exists() else shutil.which("uv") or "uv", "pip", "compile", "--no-config", "--quiet",
               "--no-header", "--no-annotate", "--python", sys.executable, "--python-platform", "x86_64-manylinux_2_28",
               "-c", "constraints.txt", "--extra", "test", "pyproject.toml", str(folder / "torch.in")]  # fmt: skip
    start = lambda python: subprocess.Popen(
        [*command, "--python-version", python], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    running = {python: start(python) for python in PYTHONS}
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("python", PYTHONS)
def test_the_package_index_has_them(resolutions, python):
    """`pip install -c constraints.txt torch '.[test]'` finds a set of versions, and it is the pinned one."""
    try:
        found, errors = resolutions[python].communicate(timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the package index gave no answer in 240 s: Python {python} was not tried")
    if resolutions[python].returncode != 0 and UNREACHABLE.search(errors):
        pytest.skip(f"the package index is not reachable: Python {python} was not tried")
    assert resolutions[python].returncode == 0, errors
    resolved = dict(line.split(";")[0].strip().split("==") for line in found.splitlines() if "==" in line)
    pins = _pins(python)
    assert {name: resolved.get(name) for name in pins} == pins


def _interpreter(python: str) -> str:
    found = interpreter(python)
    return found or pytest.skip(f"no Python {python} with pip is at hand: it was not tried")


@pytest.mark.install
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("python", PYTHONS)
def test_pip_itself_resolves(python, tmp_path):
    """The same by the pip that `make` uses. Where the index serves no metadata files pip downloads whole wheels."""
    report = tmp_path / "report.json"
    command = [_interpreter(python), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet",
               "--report", str(report), "-c", "constraints.txt", "torch", ".[test]"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    if "Retrying (" in done.stderr and "from versions: none" in done.stderr:
        pytest.skip(f"the package index is not reachable: Python {python} was not tried")
    assert done.returncode == 0, done.stderr
    assert report.exists()
