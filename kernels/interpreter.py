"""bfloat16 as the GPU has it, also under TRITON_INTERPRET=1.

Triton's interpreter keeps bfloat16 as 16-bit integers: its tl.dot multiplies those integers, and its cast
from float32 cuts bits off where the GPU rounds to nearest even. `dot` and `cast` are tl.dot and tl.cast where a
kernel is compiled, and work around both where it is interpreted.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc, accumulated in float32; float32 operands are not rounded to TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x (float32) in dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
