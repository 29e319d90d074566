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
    """Whether `function` makes c + a @ b of small whole numbers, which every order of summation makes exactly.

    Without torch, of whose tensors a transform or a mode may make something else.
    """
    rows, columns, inner = 2, 4, 3
    a, b, c = (list(map(float, range(n))) for n in (rows * inner, inner * columns, rows * columns))
    wanted = [
        c[i * columns + j] + sum(a[i * inner + k] * b[k * columns + j] for k in range(inner))
        for i in range(rows)
        for j in range(columns)
    ]
    floats = [(ctypes.c_float * len(values))(*values) for values in (b, a, c)]
    # 64 bits each: a library that reads 32 finds the same numbers in their lower halves.
    m, n, k = (ctypes.byref(ctypes.c_int64(size)) for size in (columns, rows, inner))
    plain, one = ctypes.c_char_p(b"n"), ctypes.byref(ctypes.c_float(1.0))
    function.restype = None
    function(plain, plain, m, n, k, one, floats[0], m, floats[1], k, one, floats[2], m)
    return list(floats[2]) == wanted
