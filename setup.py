"""Builds gpt2_fast._C with ninja: no torch header is included, so no torch is needed to build.

Every kernel source in csrc/ is compiled once per instruction set (the binary picks one at run time,
see csrc/dispatch.cpp), and embedding.cu becomes a fatbin where nvcc is found.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
KERNELS = ["embedding", "add_layernorm", "layernorm_linear_gelu", "attention", "attention_decode",
           "linear_cross_entropy", "adamw", "table"]  # fmt: skip
ONCE = ["dispatch", "cuda_driver", "bindings"]
X86_ISAS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
    "avx512bf16": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 "
    "-mprefer-vector-width=512",
}
CUDA_ARCHS = ["80", "90", "100"]


def source_hash() -> str:
    """One hash of csrc/, compiled in, so that a stale extension can be told from a fresh one."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.glob("*")):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (Path(home) / "bin" / "nvcc" if home else None, shutil.which("nvcc")):
        if candidate and Path(candidate).exists():
            return str(candidate)
    return None


def ninja_file(build: Path, target: Path, fatbin: Path | None) -> str:
    """The build as one ninja file: an object per source and instruction set, one shared library."""
    import pybind11

    cxx = os.environ.get("CXX", "g++" if shutil.which("g++") else "c++")
    isas = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": ""}
    includes = f"-I{CSRC} -I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    common = f"-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math {includes}"
    defines = " ".join(f"-DGPT2_HAVE_{isa.upper()}" for isa in isas)
    rules = [
        "rule cxx\n  command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx -shared -fopenmp $in -o $out -ldl",
        f"cxx = {cxx}",
    ]
    objects = []
    for isa, march in isas.items():
        for stem in KERNELS:
            out = build / f"{stem}.{isa}.o"
            objects.append(out)
            rules.append(f"build {out}: cxx {CSRC / (stem + '.cpp')}\n"
                         f"  flags = {common} {march} -DGPT2_ISA={isa}")  # fmt: skip
    for stem in ONCE:
        out = build / f"{stem}.o"
        objects.append(out)
        extra = f"{defines} -DGPT2_SOURCE_HASH='\"{source_hash()}\"'"
        rules.append(f"build {out}: cxx {CSRC / (stem + '.cpp')}\n  flags = {common} {extra}")
    rules.append(f"build {target}: link {' '.join(map(str, objects))}")
    outputs = [target]
    nvcc = find_nvcc()
    if nvcc and fatbin:
        gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS)
        gencode += f" -gencode arch=compute_{CUDA_ARCHS[0]},code=compute_{CUDA_ARCHS[0]}"
        rules.append(f"rule nvcc\n  command = {nvcc} -std=c++17 -O3 --fatbin {gencode} $in -o $out")
        inputs = f"{CSRC / 'embedding.cu'} | " + " ".join(str(h) for h in sorted(CSRC.glob("*.h")))
        rules.append(f"build {fatbin}: nvcc {inputs}")
        outputs.append(fatbin)
    return "\n".join(rules) + f"\ndefault {' '.join(map(str, outputs))}\n"


class NinjaBuild(build_ext):
    """`build_ext` that hands the whole graph to ninja."""

    def build_extension(self, ext: Extension) -> None:
        import ninja

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(build, target, target.parent / "embedding.fatbin"))
        executable = Path(ninja.BIN_DIR) / "ninja"
        command = [str(executable), "-C", str(build)]
        if subprocess.call(command) != 0:
            sys.exit("gpt2_fast: the C++ extension did not build; a C++17 compiler (g++ >= 9 or clang >= 12) "
                     "with OpenMP is needed, see the messages above")  # fmt: skip


setup(
    ext_modules=[Extension("gpt2_fast._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
    package_data={"gpt2_fast": ["embedding.fatbin", "embedding.cu", "*.h"]},
)
