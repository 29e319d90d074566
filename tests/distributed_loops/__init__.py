"""What tests/test_distributed_loops.py runs in processes of its own: `python -m distributed_loops GROUP FOLDER`.

Every rank runs the functions of a group, in order, and leaves {name: numbers} in FOLDER/RANK.json. A number is how far
the ranks together are from one process that trains on the whole batch, which every rank works out for itself.

setting   models, batches, one process's result, and how far two are from it
own       DistributedDataParallel and fully_shard in a loop of one's own
dtensors  AdamW on DTensors, and its state elsewhere
refused   what a rank cannot see of the others: FSDP1, ZeroRedundancyOptimizer, parameters outside of fully_shard
trainers  accelerate and Trainer
wrapped   DistributedDataParallel and fully_shard under torch's SGD
compiled  torch.compile beside DDP and FSDP2
"""

from . import compiled, dtensors, own, refused, trainers, wrapped  # noqa: F401 - each puts its cases into GROUPS
from .setting import GROUPS  # noqa: F401
