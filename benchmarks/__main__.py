"""`python -m benchmarks NAME`: whole steps and single operations, beside what people use today."""

import importlib
import sys

# Each is a module of this package with a main(argv).
COMMANDS = (
    "train", "compare", "reproduce", "scale", "generate", "reading", "quantisation", "ops", "products", "roofline",
    "tune", "profile_step",
)  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} [options]")
    sys.exit(importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:]))
