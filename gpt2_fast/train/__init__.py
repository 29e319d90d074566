"""What `gpt2-fast train` runs.

loop     a run: its folder, its data, validation, samples, saving and resuming
step     the model and optimizer of a run, and one step of it
memory   what a run takes of memory, by arithmetic, and whether it fits
dry_run  what `--dry-run` prints
config   the options, with no torch: the command line reads them
"""

from __future__ import annotations

from gpt2_fast.lazy import exports

_NAMES = {
    "loop": ("Run", "prepare_folder", "resolve_device", "resume_run", "start_run"),
    "step": ("Step", "build_model", "build_optimizer"),
    "memory": ("Memory", "check_fits"),
    "dry_run": ("estimate_run",),
    "config": ("TrainConfig",),
}
__getattr__, __dir__, __all__ = exports(__name__, _NAMES)
