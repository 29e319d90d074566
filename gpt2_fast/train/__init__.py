"""What `gpt2-fast train` runs.

start        how a run begins: anew, or from what a folder holds
loop         a run: the loop, and what it does beside the steps
going_on     what a run takes up from the checkpoint that it goes on from
setting      what its bits and losses depend on beside its options
validation   its validation losses
checkpoints  what is saved, and which is the best
conclusion   how a run ends: what it says, the plot, a sample, and where everything is
folder       a run's folder: its options, where it goes on from
place        the folder's lock, and what a run does where the folder is no longer its own
home         the folder while the run goes on: what is written to it, wherever it is by then
step         the model and optimizer of a run, and one step of it
loss_scale   what a float16 loss is multiplied by, and how that moves
processes    the device of each process of a run, and what all must have alike
ahead        batches made ahead by a thread
finite       what is not finite ends a run and is not saved
readout      losses and norms read without waiting for a device
saving       checkpoints written beside the steps
log          metrics.jsonl
sample       the text that a run shows of its model
trackers     the same numbers in TensorBoard and Weights & Biases
say          printing that never ends a run
progress     a bar on a terminal, lines elsewhere
stop         signals and faults that end a run, on all processes
verify       a step computed twice and compared to the bit
memory       what a run takes of memory, by arithmetic, and whether it fits
dry_run      what `--dry-run` prints
eval_only    what `--eval-only` prints
config       the options, with no torch: the command line reads them
options      the options as a YAML file
"""

from __future__ import annotations

from gpt2_fast.lazy import exports

_NAMES = {
    "start": ("resume_run", "start_run"),
    "loop": ("Run",),
    "step": ("Step", "build_model", "build_optimizer"),
    "memory": ("Memory", "check_fits"),
    "dry_run": ("estimate_run",),
    "eval_only": ("evaluate_run",),
    "config": ("TrainConfig",),
}
__getattr__, __dir__, __all__ = exports(__name__, _NAMES)
