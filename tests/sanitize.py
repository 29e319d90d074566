"""python -m tests.sanitize [--threads] [--examples N] [--build-only]: operations' tests and generated inputs, checked.

csrc/ is compiled with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize, for the instruction sets of
this processor; conftest.py lets the tests load that build where EXTENSION names it. A finding ends its process:
generated inputs report the call and go on with the rest.

--threads: with ThreadSanitizer, into build/tsan. It does not know libgomp's barriers, so that build has the functions
of OpenMP that it calls from tests/tsan_openmp.cpp, on pthreads.
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
BUILD, THREADS_BUILD = ROOT / "build" / "sanitize", ROOT / "build" / "tsan"
OPENMP = ROOT / "tests" / "tsan_openmp.cpp"
EXTENSION = "GPT2_FAST_TEST_EXTENSION"  # a folder with another build of gpt2_fast._C
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1"}
THREADS_FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=thread"
THREADS_OPTIONS = {
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 abort_on_error=1 report_thread_leaks=0",
    "OMP_NUM_THREADS": "3",
}
# Instruction sets as /proc/cpuinfo calls them.
NEEDS = {
    "avx2": "avx2",
    "avxvnni": "avx_vnni",
    "avx512": "avx512f",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "amx": "amx_bf16",
}


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


def build(threads: bool = False) -> None:
    """Compiles csrc/ into its folder; what has not changed since is not compiled again."""
    folder, sets = (THREADS_BUILD, instruction_sets()[:2]) if threads else (BUILD, instruction_sets())
    compiler, flags = ("g++", FLAGS) if not threads else (_compiler_with_openmp(), THREADS_FLAGS)
    env = os.environ | {"CXX": compiler, "CXXFLAGS": flags, "GPT2_FAST_ISAS": " ".join(sets)}
    env["GPT2_FAST_REQUIRE_EXTENSION"] = "1"
    arguments = ["build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=ROOT, env=env, check=True)


def _compiler_with_openmp() -> str:
    """A g++ that links OPENMP's functions into a library, before libgomp's."""
    THREADS_BUILD.mkdir(parents=True, exist_ok=True)
    part, script = THREADS_BUILD / "openmp.o", THREADS_BUILD / "g++"
    flags = [*THREADS_FLAGS.split(), "-fPIC", "-fvisibility=hidden"]
    subprocess.run(["g++", *flags, "-c", str(OPENMP), "-o", str(part)], check=True)
    script.write_text(
        f'#!/bin/sh\ncase "$*" in\n*-shared*) exec g++ "{part}" "$@" -Wl,-Bsymbolic ;;\nesac\nexec g++ "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def environment(threads: bool = False) -> dict[str, str]:
    """What a process needs to load the build: the sanitizers' libraries come before all others."""
    names = ["libtsan.so"] if threads else ["libasan.so", "libubsan.so"]
    libraries = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
                 for name in names]  # fmt: skip
    options, folder = (THREADS_OPTIONS, THREADS_BUILD) if threads else (OPTIONS, BUILD)
    return os.environ | options | {"LD_PRELOAD": " ".join(map(str.strip, libraries)), EXTENSION: str(folder)}


def run(command: list[str], threads: bool) -> int:
    """Runs Python on the build; its exit status."""
    env, start = environment(threads), []
    if threads:  # it wants its own addresses, which a random layout may take: from the very start of the process
        start = ["setarch", "-R", "env", f"LD_PRELOAD={env.pop('LD_PRELOAD')}"]
    return subprocess.run([*start, sys.executable, *command], cwd=ROOT, env=env).returncode


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("--examples", type=int, default=2000, help="generated calls")
    parser.add_argument("--threads", action="store_true", help="data races, by ThreadSanitizer")
    parser.add_argument("--build-only", action="store_true")
    a = parser.parse_args()
    build(a.threads)
    if a.build_only:
        return
    # Triton's interpreter is no part of this build, and compilers start processes of their own.
    tests = ["-m", "pytest", "tests/ops", "-p", "no:cacheprovider", "-k", "not triton and not compiles"]
    status = [run(command, a.threads) for command in (tests, ["-m", "tests.generated", "--examples", str(a.examples)])]
    raise SystemExit(int(any(status)))


if __name__ == "__main__":
    main()
