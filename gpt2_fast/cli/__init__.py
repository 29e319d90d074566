"""The command `gpt2-fast`.

No module here imports torch before its command runs: --help and a mistyped option answer at once.

command   the parser of all commands, errors as one line, exit codes
train     options of a run, made from TrainConfig
generate  text from a checkpoint
evaluate  `gpt2-fast eval`
inspect   tables and pictures
doctor    what runs on this machine
convert   between formats of checkpoints
recipe    whole runs that are written down, and their data
shared    what several commands share
__main__  `python -m gpt2_fast.cli`
"""

from __future__ import annotations

from gpt2_fast.lazy import exports

_NAMES = {"command": ("main", "parser")}
__getattr__, __dir__, __all__ = exports(__name__, _NAMES)
