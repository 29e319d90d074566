"""The CUDA kernels of ``csrc/embedding.cu``: found or compiled, loaded and launched, with no CUDA toolkit needed.

Where nvcc was found at build time the kernels lie beside the extension as ``embedding.fatbin``. Elsewhere, or where
the driver is too old for that file, the NVRTC library that torch's CUDA wheels bring compiles the same source at
first use; the machine code is kept in the user's cache folder, and loaded from there only if nobody else can have
written it (``files.read_code``). Either goes through the driver library
(``csrc/cuda_driver.cpp``): a launch neither synchronises nor allocates, so a CUDA graph can capture it, once a first
call outside of the capture has loaded the kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from gpt2_fast import sources
from gpt2_fast.files import read_code, write_code
from gpt2_fast.ops.runtime import dispatch

WARPS = 8  # a block: csrc/embedding.cu is compiled for at most 256 threads
SOURCES = ("embedding.cu", "embedding_body.h", "philox.h")


def dtype_name(tensor: Tensor) -> str:
    """A kernel name's word for the tensor's dtype."""
    return str(tensor.dtype).removeprefix("torch.")


def dtype_pair(a: Tensor, b: Tensor) -> str:
    return f"{dtype_name(a)}_{dtype_name(b)}"


def whole(*tensors: Tensor) -> str:
    """The suffix of the kernels that need every row to be whole 16-byte words from a 16-byte boundary, or ""."""
    fits = all(t.shape[-1] % 8 == 0 and t.data_ptr() % 16 == 0 for t in tensors)
    return "_whole" if fits else ""


def launch(device: torch.device, name: str, grid: tuple, block: tuple, arguments: bytes) -> None:
    """Launches one kernel on torch's current stream of `device`; `arguments` is its one struct."""
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    dispatch.extension().cuda_launch(index, _function(index, name), grid, block, stream, arguments)


@functools.cache
def _function(index: int, name: str) -> int:
    return dispatch.extension().cuda_function(index, _module(index), name)


@functools.cache
def _module(index: int) -> int:
    extension = dispatch.extension()
    fatbin, refused = Path(extension.__file__).with_name("embedding.fatbin"), ""
    if fatbin.exists():
        try:
            return extension.cuda_load(index, fatbin.read_bytes())
        except RuntimeError as error:
            refused = f"{fatbin} does not load ({error}); "
    major, minor = torch.cuda.get_device_capability(index)
    try:
        return extension.cuda_load(index, compiled(10 * major + minor))
    except RuntimeError as error:
        raise RuntimeError(f"embedding: no CUDA kernels: {refused}{error}") from None


def source_folder() -> Path:
    """Where embedding.cu and its headers are: in the package, or in csrc/ beside it in a source tree."""
    beside = Path(dispatch.extension().__file__).with_name("cuda_src")
    for folder in (beside, sources.CSRC):
        if (folder / SOURCES[0]).exists():
            return folder
    raise RuntimeError(f"{beside / SOURCES[0]} is missing; reinstall gpt2_fast")


def find_nvrtc() -> Path:
    """The NVRTC library: of torch's wheels, else of a CUDA toolkit.

    Raises:
        RuntimeError: there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    places = [(Path(p or "."), pattern) for p in sys.path for pattern in ("nvidia/*/lib", "torch/lib")]
    for root, pattern in [*places, (Path(home), "lib64"), (Path(home), "targets/*/lib")]:
        found = sorted(lib for folder in root.glob(pattern) for lib in folder.glob("libnvrtc.so*"))
        if found:
            return found[-1]
    raise RuntimeError("NVRTC (libnvrtc.so) is not found; run: pip install nvidia-cuda-nvrtc")


class Nvrtc:
    """The few calls of NVRTC that compiling one file takes. `version` is (major, minor)."""

    def __init__(self, path: Path):
        # NVRTC opens its library of built-in functions by name alone, and finds it where it is loaded already.
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so*")):
            ctypes.CDLL(str(builtins))
        self.lib = ctypes.CDLL(str(path))
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = (major.value, minor.value)

    def _check(self, result: int, call: str, log: str = "") -> None:
        if result:
            raise RuntimeError(f"{call}: {self.lib.nvrtcGetErrorString(result).decode()} {log}".rstrip())

    def architectures(self) -> list[int]:
        """The compute capabilities it compiles for, times ten."""
        count = ctypes.c_int()
        self._check(self.lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
        archs = (ctypes.c_int * count.value)()
        self._check(self.lib.nvrtcGetSupportedArchs(archs), "nvrtcGetSupportedArchs")
        return sorted(archs)

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.lib, f"nvrtcGet{what}")(program, buffer), f"nvrtcGet{what}")
        return buffer.raw

    def compile(self, folder: Path, arch: int) -> bytes:
        """`folder`/embedding.cu as machine code for `arch`, or as PTX of the newest one below it that is known."""
        target = max((a for a in self.architectures() if a <= arch), default=None)
        if target is None:
            raise RuntimeError(f"NVRTC {self.version} does not compile for compute capability {arch / 10}")
        what, prefix = ("CUBIN", "sm") if target == arch else ("PTX", "compute")
        options = [f"--gpu-architecture={prefix}_{target}", "--std=c++17", f"--include-path={folder}"]
        source, program = (folder / SOURCES[0]).read_bytes(), ctypes.c_void_p()
        created = self.lib.nvrtcCreateProgram(ctypes.byref(program), source, SOURCES[0].encode(), 0, None, None)
        self._check(created, "nvrtcCreateProgram")
        try:
            array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            result = self.lib.nvrtcCompileProgram(program, len(options), array)
            if result:
                self._check(result, "nvrtcCompileProgram", self._bytes(program, "ProgramLog").decode())
            return self._bytes(program, what)
        finally:
            self.lib.nvrtcDestroyProgram(ctypes.byref(program))


def compiled(arch: int) -> bytes:
    """The kernels for one compute capability (times ten), from the cache or from NVRTC.

    Raises:
        RuntimeError: no NVRTC, or it does not compile the source; the message is its own.
    """
    folder, nvrtc = source_folder(), Nvrtc(find_nvrtc())
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((folder / name).read_bytes())
    version = ".".join(map(str, nvrtc.version))
    name = f"embedding-{digest.hexdigest()[:16]}-sm_{arch}-nvrtc_{version}.bin"
    image = read_code(name)
    if image is None:
        image = nvrtc.compile(folder, arch)
        with contextlib.suppress(OSError):  # a cache that cannot be written costs a compilation a process
            write_code(name, image)
    return image
