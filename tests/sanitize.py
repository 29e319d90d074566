"""python -m tests.sanitize [--examples N] [--build-only]: operations' tests and generated inputs on a checked build.

csrc/ is compiled with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize, for the instruction sets of
this processor; conftest.py lets the tests load that build where EXTENSION names it. A finding ends its process:
generated inputs report the call and go on with the rest.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
EXTENSION = "GPT2_FAST_TEST_EXTENSION"  # a folder with another build of gpt2_fast._C
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1"}
NEEDS = {"avx2": "avx2", "avx512": "avx512f", "avx512bf16": "avx512_bf16"}  # as /proc/cpuinfo calls it


class Finder:
    """Imports gpt2_fast._C from a folder, whatever else there is."""

    def __init__(self, folder: str):
        found = sorted(Path(folder).glob("gpt2_fast/_C.*.so"))
        if not found:
            raise FileNotFoundError(f"{EXTENSION} is {folder!r}, and no gpt2_fast/_C.*.so is in it")
        self.path = str(found[0])

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != "gpt2_fast._C":
            return None
        return importlib.util.spec_from_file_location(name, self.path)


def instruction_sets() -> list[str]:
    """Those that this processor has, by the names of setup.py."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return ["baseline", *(isa for isa, flag in NEEDS.items() if flag in flags)]


def build() -> None:
    """Compiles csrc/ into BUILD; what has not changed since is not compiled again."""
    env = os.environ | {"CXX": "g++", "CXXFLAGS": FLAGS, "GPT2_FAST_ISAS": " ".join(instruction_sets())}
    arguments = ["build_ext", "--build-lib", str(BUILD), "--build-temp", str(BUILD / "objects")]
    subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=ROOT, env=env, check=True)


def environment() -> dict[str, str]:
    """What a process needs to load the build: the sanitizers' libraries come before all others."""
    libraries = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
                 for name in ("libasan.so", "libubsan.so")]  # fmt: skip
    return os.environ | OPTIONS | {"LD_PRELOAD": " ".join(map(str.strip, libraries)), EXTENSION: str(BUILD)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("--examples", type=int, default=2000, help="generated calls")
    parser.add_argument("--build-only", action="store_true")
    a = parser.parse_args()
    build()
    if a.build_only:
        return
    # Triton's interpreter is no part of this build, and compilers start processes of their own.
    tests = ["-m", "pytest", "tests/ops", "-p", "no:cacheprovider", "-k", "not triton and not compiles"]
    status = [subprocess.run([sys.executable, *command], cwd=ROOT, env=environment()).returncode
              for command in (tests, ["-m", "tests.generated", "--examples", str(a.examples)])]  # fmt: skip
    raise SystemExit(int(any(status)))


if __name__ == "__main__":
    main()
