"""One run on several processes, started by torchrun, with the bits that it has on one.

group      the processes of a run: who is first, what they send each other, how they end together
tree       the order in which the micro-batches of a step are added
flat       parameters laid end to end, and the shard of each process
gradients  the sum of a step's gradients
shards     the part of AdamW's state that a process holds
dtensor    AdamW of parameters that FSDP2 has cut: local shards and one norm

State of the process: `group._current`, the group that this process has joined.
"""

from __future__ import annotations

from gpt2_fast.lazy import exports

_NAMES = {
    "group": ("Group", "Lost", "join", "leave"),
    "flat": ("Layout",),
}
__getattr__, __dir__, __all__ = exports(__name__, _NAMES)
