"""Ahead-of-time compilation of the Triton kernels, with no GPU at hand.

Every kernel file lists the configurations it ships as `aot_specs() -> list[AotSpec]`. `compile_spec` builds
one of them for an architecture of cards.py and `inspect` reads from the machine code what a review needs: registers,
spills, shared memory, the tensor-core instructions and what the loops around them hold. The tools it calls for NVIDIA's
(cuobjdump, nvdisasm) come with the Triton wheel; AMD's assembly says it in words.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import cards, disassembly
from .cards import INTERPRETER

ARCHS = tuple(cards.ARCHS)

TRITON_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

# Every launch passes these, so that what runs is what was compiled here: Triton changes the default in 3.10.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

_OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
_WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\b")
_EXECUTABLE = 4  # SHF_EXECINSTR, a section's flag (System V ABI, "Sections")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_AMD_METADATA = re.compile(r"^\s*\.(\w+_(?:count|size)):\s*(\d+)$", re.MULTILINE)
_AMD_MMA = re.compile(r"^\s*(v_s?mfma_\w+)", re.MULTILINE)


@dataclass(frozen=True)
class AotSpec:
    """One configuration of one kernel.

    kernel: the `@triton.jit` function.
    name: what tells this configuration from its siblings, as the report prints it.
    signature: run-time argument -> Triton type ("*bf16", "i32", "fp32"), without the constexprs.
    constexprs: the constexpr arguments; a pointer that is absent is given here as None.
    attrs: names of the arguments known to be multiples of 16 (pointers: bytes; integers: the value).
    archs: the architectures (of cards.py) this configuration ships for.
    maxnreg: most registers a thread; None leaves it to ptxas, whose own aim may be a few too low.
    """

    kernel: Any
    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    attrs: tuple[str, ...] = ()
    archs: tuple[cards.Name, ...] = ARCHS
    maxnreg: int | None = None


@dataclass(frozen=True)
class Compiled:
    """The machine code of one AotSpec for one architecture: a cubin, or AMD's code object."""

    spec: AotSpec
    arch: cards.Name
    binary: bytes
    shared_bytes: int
    asm: dict[str, Any]


def make_spec(
    kernel: Any,
    name: str,
    types: dict[str, str],
    constexprs: dict[str, Any],
    config: dict[str, int],
    archs: tuple[cards.Name, ...] = ARCHS,
    unaligned: tuple[str, ...] = (),
) -> AotSpec:
    """An AotSpec whose pointers and integers are multiples of 16, but for those named in `unaligned`.

    types: Triton type of each run-time argument; the arguments named *_ptr that it leaves out are None. config: what
    `tuning.config` gives; of it the kernel's own constexprs and Triton's options are taken.
    """
    absent = [arg for arg in kernel.arg_names if arg.endswith("_ptr") and arg not in types]
    attrs = tuple(arg for arg, kind in types.items() if kind != "fp32" and arg not in unaligned)
    blocks = {key: value for key, value in config.items() if key in kernel.arg_names}
    options = {key: config[key] for key in ("num_warps", "num_stages", "maxnreg") if key in config}
    constexprs = {**dict.fromkeys(absent), **constexprs, **blocks}
    return AotSpec(kernel, name, types, constexprs, attrs=attrs, archs=archs, **options)


def forms_for(arch: cards.Name, forms: Iterable[Any]) -> list[Any]:
    """What a kernel ships for, dtypes or tuples with them, on one architecture: float16 where it has no bfloat16."""
    if cards.ARCHS[arch].bfloat16:
        return list(forms)
    half = lambda form: tuple(map(half, form)) if isinstance(form, tuple) else "fp16" if form == "bf16" else form
    return list(dict.fromkeys(map(half, forms)))


def compile_spec(spec: AotSpec, arch: cards.Name) -> Compiled:
    """Compiles `spec` for an architecture of cards.py.

    Raises RuntimeError under TRITON_INTERPRET=1 (there is then no kernel to compile) and ValueError when the
    spec does not name every argument of its kernel exactly once.
    """
    kernel = spec.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(f"{spec.name}: kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
    given = [*spec.signature, *spec.constexprs]
    if sorted(given) != sorted(kernel.arg_names):
        odd = sorted(set(given) ^ set(kernel.arg_names)) or "an argument given twice"
        raise ValueError(f"{spec.name}: the spec and the kernel's arguments differ: {odd}")
    signature = {name: spec.signature.get(name, "constexpr") for name in kernel.arg_names}
    amd = isinstance(arch, str)
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in spec.attrs}
    for index, name in enumerate(kernel.arg_names):
        if amd and signature[name].startswith("*"):  # as a launch says of a tensor of less than 2 GiB
            attrs.setdefault((index,), []).append(["tt.pointer_range", 32])
    source = ASTSource(fn=kernel, signature=signature, constexprs=spec.constexprs, attrs=attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "maxnreg": spec.maxnreg, **LAUNCH_OPTIONS}
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32)
    built = triton.compile(source, target=target, options=options)
    return Compiled(spec, arch, built.asm["hsaco" if amd else "cubin"], built.metadata.shared, built.asm)


def config_arch(device: torch.device) -> cards.Name:
    """Whose rows of a table of configurations a device takes: a key of `cards.ARCHS`, or INTERPRETER for the CPU.

    Raises RuntimeError, one line, for a card that is not supported.
    """
    return INTERPRETER if device.type == "cpu" else _card_arch(device.index)


@functools.lru_cache
def _card_arch(index: int | None) -> cards.Name:
    if reason := cards.refusal(index):
        raise RuntimeError(reason)
    return cards.of_device(index)[0]


def find_tool(name: str) -> str:
    """Path of a CUDA tool: $TRITON_<NAME>_PATH, the Triton wheel's own, else PATH. Raises RuntimeError."""
    wheel = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    for candidate in (os.environ.get(f"TRITON_{name.upper()}_PATH"), str(wheel), shutil.which(name)):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise RuntimeError(f"{name} not found in the Triton wheel ({wheel.parent}) or on PATH; install the CUDA toolkit")


def inspect(compiled: Compiled) -> dict[str, Any]:
    """Reads the machine code of `compiled`.

    Returns registers (a thread), spilled_bytes (stack a thread: spills and local arrays), shared_bytes (a
    block), shared_limit, mma: {tensor-core opcode: count in the code}, waits: how often the code waits for sm_90's
    products, loops: a `disassembly.Loop` for each main loop, and sha256, the `code_hash`.
    """
    read = _read_amd if isinstance(compiled.arch, str) else _read_nvidia
    return {
        **read(compiled),
        "shared_bytes": compiled.shared_bytes,
        "shared_limit": cards.ARCHS[compiled.arch].shared,
        "sha256": code_hash(compiled.binary),
    }


def _read_nvidia(compiled: Compiled) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.binary)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        # ptxas makes no tensor-core instruction where the PTX has none, and most kernels have none
        code = _run("nvdisasm", "-c", file.name) if "mma" in compiled.asm["ptx"] else ""
    resources = _RESOURCES.search(usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no resource line for {compiled.spec.name}")
    mma = collections.Counter(opcode for opcode in _OPCODE.findall(code) if opcode.endswith("MMA"))
    return {
        "registers": int(resources[1]),
        "spilled_bytes": int(resources[2]),
        "mma": dict(mma),
        "waits": len(_WAIT.findall(code)),
        "loops": disassembly.main_loops(code),
    }


def _read_amd(compiled: Compiled) -> dict[str, Any]:
    """From the assembly and the metadata at its end (LLVM, "User Guide for AMDGPU Backend", "Code Object V5 Metadata").

    Vector registers that spill, 4 bytes a lane, go to scratch memory, which is the private segment. Scalar ones go into
    lanes of vector registers: that costs an instruction and no memory, and is not counted.
    """
    code = compiled.asm["amdgcn"]
    of = {name: int(value) for name, value in _AMD_METADATA.findall(code)}
    missing = {"vgpr_count", "vgpr_spill_count", "private_segment_fixed_size"} - of.keys()
    if missing:
        raise RuntimeError(f"{compiled.spec.name}: AMD's metadata has no .{sorted(missing)[0]}")
    spilled = max(of["private_segment_fixed_size"], 4 * of["vgpr_spill_count"])
    mma = collections.Counter(_AMD_MMA.findall(code))
    loops = disassembly.main_loops(code)
    return {"registers": of["vgpr_count"], "spilled_bytes": spilled, "mma": dict(mma), "waits": 0, "loops": loops}


def code_hash(cubin: bytes) -> str:
    """SHA-256, in hexadecimal, of the instructions alone of a cubin or of AMD's code object, which are ELF files too:
    what its sections of executable code hold.

    Names, paths, line numbers and debug information lie in other sections, so a kernel that moves keeps its hash.
    Raises ValueError for what is no 64-bit ELF file or holds no code.
    """
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a cubin: no 64-bit ELF header")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    digest, found = hashlib.sha256(), False
    for index in range(count):
        _, _, flags, _, offset, length = struct.unpack_from("<IIQQQQ", cubin, table + index * size)
        if flags & _EXECUTABLE:
            digest.update(cubin[offset : offset + length])
            found = found or length > 0
    if not found:
        raise ValueError("the cubin holds no code")
    return digest.hexdigest()


def problems(report: dict[str, Any]) -> list[str]:
    """What in a report of `inspect` must not ship: spills, more shared memory than a block can have, or tensor-core
    products that run one at a time (ptxas says C7515: their accumulators are touched while they are incomplete)."""
    found = []
    if report["spilled_bytes"]:
        found.append(f"spills {report['spilled_bytes']} bytes a thread")
    limit = report["shared_limit"]
    if limit is not None and report["shared_bytes"] > limit:
        found.append(f"needs {report['shared_bytes']} bytes of shared memory, the limit is {limit}")
    for loop in filter(lambda loop: loop.serialised, report["loops"]):
        found.append(f"waits {loop.waits} times for the {loop.products} tensor-core products of a main loop")
    return found


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([find_tool(tool), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
