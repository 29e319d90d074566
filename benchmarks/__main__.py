"""`python -m benchmarks NAME`: whole steps and single operations, beside what people use today."""

import importlib
import sys

COMMANDS = (
    "train",
    "generate",
    "ops",
    "roofline",
    "tune",
    "profile_step",
)  # each a module of this package with a main(argv)

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} [options]")
    sys.exit(importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:]))
