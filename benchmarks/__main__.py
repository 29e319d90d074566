"""`python -m benchmarks train`: tokens per second of the whole training step, beside what people use today."""

import sys

from benchmarks import train

COMMANDS = {"train": train.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} [options]")
    sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
