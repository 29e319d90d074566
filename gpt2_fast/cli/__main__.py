"""`python -m gpt2_fast.cli` is the command `gpt2-fast`."""

from __future__ import annotations

import sys

from gpt2_fast.cli.command import main

if __name__ == "__main__":  # not in a process that another one spawns
    sys.exit(main())
