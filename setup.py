"""Builds gpt2_fast._C with ninja: no torch header is included, so no torch is needed to build.

Every kernel source in csrc/ is compiled once per instruction set that it gains from (the binary picks one at run time,
see csrc/dispatch.cpp). embedding.cu becomes embedding.fatbin where nvcc is found; its source is installed as well, for
NVRTC to compile at first use elsewhere (gpt2_fast/ops/runtime/cuda.py).

Where there is no compiler, and outside of Linux, the package is installed without the extension, and plain PyTorch
runs in place of its kernels. Where the compiler works and the build does not, the installation fails.

Environment: CXX and CXXFLAGS (compiler), CUDA_HOME (where nvcc is, else PATH), MAX_JOBS (compilers at a time),
GPT2_FAST_REQUIRE_EXTENSION=1 (no installation without the extension), GPT2_FAST_ISAS (some of the instruction sets
alone, for a build that is not to be shipped).
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
ONCE = ["bindings", "cuda_driver", "dispatch"]
# Compiled once per instruction set: every source that has its header in kernels.h, and the table of their kernels.
KERNELS = [*re.findall(r'^#include "(\w+)\.h"', (CSRC / "kernels.h").read_text(), re.MULTILINE), "table"]
X86_ISAS = {
    "baseline": "-O2",  # for processors before 2013: compile time matters more
    "avx2": "-mavx2 -mfma -mf16c",
    "avxvnni": "-mavx2 -mfma -mf16c -mavxvnni",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}
X86_ISAS["avx512vnni"] = X86_ISAS["avx512"] + " -mavx512vnni"
X86_ISAS["avx512bf16"] = X86_ISAS["avx512vnni"] + " -mavx512bf16"
X86_ISAS["amx"] = X86_ISAS["avx512bf16"] + " -mamx-tile -mamx-bf16"
# An instruction set that only some sources gain from: its table takes the other kernels from the set it is based on.
# The last is one of its instructions, which an old assembler does not know.
PARTIAL = {
    "avxvnni": ("avx2", ["decode_step"], "{vex} vpdpbusd %ymm0, %ymm1, %ymm2"),
    "avx512vnni": ("avx512", ["decode_step"], "vpdpbusd %zmm0, %zmm1, %zmm2"),
    "avx512bf16": (
        "avx512",
        ["add_layernorm", "attention", "mlp", "decode_step", "linear", "linear_cross_entropy"],
        "vdpbf16ps %zmm0, %zmm1, %zmm2",
    ),
    "amx": ("avx512bf16", ["attention", "linear"], "tdpbf16ps %tmm0, %tmm1, %tmm2"),
}
# Python's stable ABI: one build for 3.10 and every later one. The free-threaded builds of Python have none so far.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")
LIMITED_API = "-DPy_LIMITED_API=0x030A0000" if STABLE_ABI else ""
CUDA_SOURCES = ["embedding.cu", "embedding_body.h", "philox.h"]
CUDA_ARCHS = ["75", "80", "90", "100", "120"]  # sm_80's code runs on sm_86 and sm_89 as it is
SOURCES = runpy.run_path(str(ROOT / "gpt2_fast" / "sources.py"))


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (Path(home) / "bin" / "nvcc" if home else None, shutil.which("nvcc")):
        if candidate and Path(candidate).exists():
            return str(candidate)
    return None


def known_isas(cxx: str) -> dict[str, str]:
    """Instruction sets and their flags, without those that this compiler or its assembler does not know: g++ 9 has no
    AVX512-BF16, binutils 2.34 no AMX."""
    if not sysconfig.get_platform().endswith(("x86_64", "amd64")):  # of what is built for, on whatever machine
        return {"baseline": ""}

    def known(isa: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            command = f"{cxx} {X86_ISAS[isa]} -c -x c++ - -o {shlex.quote(folder)}/probe.o"
            done = subprocess.run(
                shlex.split(command), input=f'asm("{PARTIAL[isa][2]}");', capture_output=True, text=True
            )
            return done.returncode == 0

    wanted = os.environ.get("GPT2_FAST_ISAS", " ".join(X86_ISAS)).split()
    isas = {}
    for isa, march in X86_ISAS.items():
        if isa in wanted and (isa not in PARTIAL or (PARTIAL[isa][0] in isas and known(isa))):
            isas[isa] = march
    return isas


def isa_flags(stem: str, isa: str) -> str | None:
    """Names the instruction set to a kernel source, and to the table which kernels are its own; None: not built."""
    if isa not in PARTIAL:
        return f"-DGPT2_ISA={isa}"
    base, stems, _ = PARTIAL[isa]
    flags = f"-DGPT2_ISA={isa} -DGPT2_BASE_ISA={base}"
    if stem != "table":
        return flags if stem in stems else None
    kernels_of = lambda stems: " ".join(f"GPT2_{s.upper()}_KERNELS(KERNEL)" for s in stems)
    root, of_base, _ = PARTIAL.get(base, (base, None, ""))
    middle = f" '-DGPT2_BASE_KERNELS(KERNEL)={kernels_of(of_base)}'" if of_base else ""
    return f"{flags} -DGPT2_ROOT_ISA={root}{middle} '-DGPT2_OWN_KERNELS(KERNEL)={kernels_of(stems)}'"


def nvcc_flags(nvcc: str) -> str:
    """Machine code for those of CUDA_ARCHS that this nvcc knows, and PTX of sm_80 for every later GPU.

    All of it from that PTX, as the source has code of its own for sm_75 alone: half the time of a pass for each.
    """
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    archs = [a for a in CUDA_ARCHS if f"compute_{a}" in known or a == "80"]
    code = ",".join([*(f"sm_{a}" for a in archs if a != "75"), "compute_80"])
    oldest = "-gencode=arch=compute_75,code=sm_75 " if "75" in archs else ""
    return f"-std=c++17 -O3 --threads 0 --fatbin {oldest}'-gencode=arch=compute_80,code=[{code}]'"


def compiler() -> str:
    return os.environ.get("CXX") or ("g++" if shutil.which("g++") else "c++")


PROBE = """#include <Python.h>
#include <string>
int probe(int n) {
  int sum = 0;
#pragma omp parallel for reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += (int)std::to_string(i).size();
  return sum;
}
"""


def lacking(cxx: str) -> str | None:
    """What this machine lacks for the extension, and how to get it; None where it can be built."""
    if sys.platform != "linux":
        return f"it is built on Linux alone, and this is {platform.system()}"
    if not shutil.which(shlex.split(cxx)[0]):
        return f"no C++ compiler ({cxx}) was found; install g++, or name another one by CXX"
    with tempfile.TemporaryDirectory() as folder:
        flags = f"-std=c++17 -fPIC -fopenmp -shared -I{sysconfig.get_path('include')} {os.environ.get('CXXFLAGS', '')}"
        command = [*shlex.split(cxx), *shlex.split(flags), "-x", "c++", "-", "-o", str(Path(folder) / "probe.so")]
        done = subprocess.run(command, input=PROBE, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if "error" in line or "cannot find" in line] or [done.stderr]
    return (f"{cxx} does not compile for it ({said[0].strip()}); install g++ 9 or newer, or clang 12 or newer with its "
            "OpenMP, and Python's headers (python3-dev)")  # fmt: skip


def ninja_file(build: Path, target: Path, fatbin: Path) -> str:
    """The build as one ninja file: an object per source and instruction set, one shared library, one fatbin."""
    cxx = compiler()
    isas = known_isas(cxx)
    common = (f"-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math -I{CSRC} "
              + os.environ.get("CXXFLAGS", ""))  # fmt: skip
    python = f"-I{sysconfig.get_path('include')} {LIMITED_API}"
    source_hash = SOURCES["source_hash"](CSRC)
    once_flags = {
        "dispatch": " ".join(f"-DGPT2_HAVE_{isa.upper()}" for isa in isas),
        "bindings": f"{python} -DGPT2_SOURCE_HASH='\"{source_hash}\"'",
    }
    rules = [
        "rule cxx\n  command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
        "  description = $in $isa",
        "rule link\n  command = $cxx -shared -fopenmp $in -o $out -ldl\n  description = $out",
        f"cxx = {cxx}",
    ]
    objects = []

    def compile_one(stem: str, name: str, flags: str, isa: str = "") -> None:
        objects.append(build / f"{name}.o")
        rules.append(f"build {objects[-1]}: cxx {CSRC / (stem + '.cpp')}\n  flags = {common} {flags}\n  isa = {isa}")

    outputs = [target]
    if nvcc := find_nvcc():
        # A toolkit that does not get along with this compiler is no reason to fail: NVRTC does without.
        rules.append(f"rule nvcc\n  command = {nvcc} {nvcc_flags(nvcc)} $in -o $out || {{ rm -f $out; echo "
                     "'gpt2_fast: nvcc failed; NVRTC will compile the CUDA kernels at first use'; }\n"
                     "  description = $in")  # fmt: skip
        source, *headers = (str(CSRC / name) for name in CUDA_SOURCES)
        rules.append(f"build {fatbin}: nvcc {source} | {' '.join(headers)}")
        outputs.append(fatbin)
    for stem in ONCE:
        compile_one(stem, stem, once_flags.get(stem, ""))
    for stem in KERNELS:
        for isa, march in isas.items():
            if flags := isa_flags(stem, isa):
                compile_one(stem, f"{stem}.{isa}", f"{march} {flags}", isa)
    rules.append(f"build {target}: link {' '.join(map(str, objects))}")
    return "\n".join(rules) + f"\ndefault {' '.join(map(str, outputs))}\n"


def say(line: str) -> None:
    """To the terminal, too: pip shows nothing of what a build that succeeds has printed."""
    print(line, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(line, file=terminal)


class NinjaBuild(build_ext):
    """`build_ext` that hands the whole graph to ninja; where there is no compiler, it leaves a note instead."""

    def run(self) -> None:
        folders = [Path(self.build_lib) / "gpt2_fast", *([ROOT / "gpt2_fast"] if self.inplace else [])]
        why = lacking(compiler())
        if why and os.environ.get("GPT2_FAST_REQUIRE_EXTENSION") == "1":
            sys.exit(f"gpt2_fast: GPT2_FAST_REQUIRE_EXTENSION=1, and the C++ extension cannot be built: {why}")
        for folder in folders:  # what an earlier build left would be imported, or shipped
            for old in [
                *folder.glob("_C.*"),
                *([folder / "embedding.fatbin"] if why else []),
                folder / SOURCES["NOTE"],
            ]:
                old.unlink(missing_ok=True)
        if not why:
            return super().run()
        self.extensions = []
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SOURCES["NOTE"]).write_text(why + "\n")
        say(f"gpt2_fast: installed without its C++ extension, plain PyTorch runs in place of its kernels: {why}")

    def build_extension(self, ext: Extension) -> None:
        import ninja

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not build_temp, which is a new folder at each `pip install -e .`: what did not change is not compiled again.
        build = ROOT / "build" / "ninja"
        build.mkdir(parents=True, exist_ok=True)
        cuda_sources = target.parent / "cuda_src"
        cuda_sources.mkdir(parents=True, exist_ok=True)
        for name in CUDA_SOURCES:
            shutil.copy(CSRC / name, cuda_sources / name)
        (build / "build.ninja").write_text(ninja_file(build, target, target.parent / "embedding.fatbin"))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.call(command) != 0:
            sys.exit("gpt2_fast: the C++ extension did not build, see the messages above; it needs g++ 9 or newer, or "
                     "clang 12 or newer (CXX=none installs without the extension)")  # fmt: skip

    def copy_extensions_to_source(self) -> None:
        """In place (pip install -e): the fatbin goes where the extension goes; NVRTC reads csrc/ itself."""
        super().copy_extensions_to_source()
        built, placed = (folder / "gpt2_fast" / "embedding.fatbin" for folder in (Path(self.build_lib), ROOT))
        placed.unlink(missing_ok=True)
        if built.exists():
            shutil.copy(built, placed)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("gpt2_fast._C", sources=[], py_limited_api=STABLE_ABI)],
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
    )
