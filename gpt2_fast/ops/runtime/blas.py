"""The BLAS that torch multiplies float32 matrices with on a CPU, for C++ to call it without going through Python."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch


@functools.cache
def sgemm() -> int:
    """The address of torch's own sgemm_, by the Fortran interface that every BLAS has; 0 where none can be called.

    torch's library for CPUs exports it on x86-64, where MKL is linked into it. One product shows that it is what its
    name says before anything relies on it.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not torch.backends.mkl.is_available():
        return 0
    try:
        function = ctypes.CDLL(str(library)).sgemm_
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value if _multiplies(function) else 0


def _multiplies(function: ctypes._CFuncPtr) -> bool:
    """Whether `function` makes a @ b + c of small whole numbers, which every order of summation makes exactly."""
    a, b, c = (torch.arange(n * m, dtype=torch.float32).view(n, m) for n, m in ((2, 3), (3, 4), (2, 4)))
    wanted, one = a @ b + c, ctypes.c_float(1.0)
    # 64 bits each: a library that reads 32 finds the same numbers in their lower halves.
    m, n, k = (ctypes.byref(ctypes.c_int64(size)) for size in (4, 2, 3))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (b, a, c)]
    plain, scale = ctypes.c_char_p(b"n"), ctypes.byref(one)
    function.restype = None
    function(plain, plain, m, n, k, scale, pointers[0], m, pointers[1], k, scale, pointers[2], m)
    return torch.equal(c, wanted)
