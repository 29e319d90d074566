"""Runs csrc/embedding.cu on the CPU: the file itself, compiled by the C++ compiler, thread after thread.

It has no shared memory and no barriers, so running its threads in turn is running it; what the CPU cannot show is
how fast it is, and what nvcc and the driver make of it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parent.parent / "csrc"

_BEFORE = """
#include <stdint.h>
#include <string.h>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)
struct Extent { unsigned x, y, z; };
static Extent blockIdx, threadIdx, blockDim;
static inline float __uint_as_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
static inline uint32_t __float_as_uint(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected, unsigned long long x) {
  unsigned long long old = *p;
  if (old == expected) *p = x;
  return old;
}
static inline float float_of_half(uint16_t bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
static inline uint16_t half_of_float(float x) { _Float16 h = (_Float16)x; uint16_t r; memcpy(&r, &h, 2); return r; }
"""

_AFTER = """
template <class Arguments>
static void launch(void (*kernel)(Arguments), const Extent* grid, const Extent* block, const void* arguments) {
  blockDim = *block;
  for (blockIdx.y = 0; blockIdx.y < grid->y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid->x; ++blockIdx.x)
      for (threadIdx.y = 0; threadIdx.y < block->y; ++threadIdx.y)
        for (threadIdx.x = 0; threadIdx.x < block->x; ++threadIdx.x) kernel(*(const Arguments*)arguments);
}
extern "C" {
void launch_forward(void* kernel, const Extent* grid, const Extent* block, const void* arguments) {
  launch((void (*)(gpt2::EmbeddingForward))kernel, grid, block, arguments);
}
void launch_backward(void* kernel, const Extent* grid, const Extent* block, const void* arguments) {
  launch((void (*)(gpt2::EmbeddingBackward))kernel, grid, block, arguments);
}
void bfloats_of_floats(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = gpt2::bfloat_of_float(x[i]);
}
int64_t offset(int64_t row, int64_t C, int64_t col) { return gpt2::embedding_offset(row, C, col); }
int64_t divide(int64_t a, int64_t b) { return gpt2::embedding_divide(a, b); }
int64_t row_of_position_entry(int64_t i, int64_t B, int64_t T) {
  gpt2::EmbeddingBackward a = {};
  a.B = B;
  a.T = T;
  return gpt2::embedding_row(a, i);
}
int64_t key_of_position_entry(int64_t i, int64_t B, int64_t T) {
  gpt2::EmbeddingBackward a = {};
  a.B = B;
  a.T = T;
  return gpt2::embedding_key(a, i);
}
}
"""


class CudaOnCpu:
    """embedding.cu as a CPU library; `launch` stands in for gpt2_fast.ops.runtime.cuda.launch."""

    def __init__(self, folder: Path):
        source, library = folder / "embedding.cpp", folder / "embedding.so"
        source.write_text(f'{_BEFORE}\n#include "embedding.cu"\n{_AFTER}')
        compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
        subprocess.run(
            [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Werror", "-Wno-psabi",
             f"-I{CSRC}", str(source), "-o", str(library)], check=True,
        )  # fmt: skip
        self.lib = ctypes.CDLL(str(library))
        for name in ("offset", "divide", "row_of_position_entry", "key_of_position_entry"):
            getattr(self.lib, name).restype = ctypes.c_int64
        self.launched: list[str] = []

    def index(self, name: str, *arguments: int) -> int:
        """One of the shared index functions of embedding_body.h."""
        return getattr(self.lib, name)(*(ctypes.c_int64(a) for a in arguments))

    def bfloats(self, x: Tensor) -> Tensor:
        """float32 x in bfloat16 by the integer code of cards below sm_80."""
        out = torch.empty(x.shape, dtype=torch.bfloat16)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x.contiguous(), out))
        self.lib.bfloats_of_floats(*pointers, ctypes.c_int64(x.numel()))
        return out

    def launch(self, device, name: str, grid: tuple, block: tuple, arguments: bytes) -> None:
        """Runs the kernel's threads one after another."""
        extents = [(ctypes.c_uint * 3)(*extent) for extent in (grid, block)]
        kernel = ctypes.cast(getattr(self.lib, name), ctypes.c_void_p)
        run = self.lib.launch_forward if "forward" in name else self.lib.launch_backward
        run(kernel, *extents, ctypes.c_char_p(arguments))
        self.launched.append(name)
