"""Generated inputs: every operation with shapes, strides, dtypes and options that nobody chose.

`describe` draws a call as a dict of plain values, so that it can be written down before it is made; `judge` makes it
and says what came of it. ``python -m tests.generated`` does so ten thousand times, in a process that may die of it.
"""

from gpt2_fast.ops import rooms
from gpt2_fast.ops.runtime.dispatch import TABLE

rooms()
OPS = tuple(TABLE)
