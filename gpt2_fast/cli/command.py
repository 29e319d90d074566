"""The command line as a whole, and how a command ends."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys

from gpt2_fast.cli import convert, doctor, evaluate, generate, inspect, train

DESCRIPTION = "GPT-2 training and generation through fused kernels, exact to Hugging Face's GPT-2."
COMMANDS = (train, generate, evaluate, inspect, doctor, convert)  # in the order of --help


def parser() -> argparse.ArgumentParser:
    """The command line, whole."""
    top = argparse.ArgumentParser(prog="gpt2-fast", description=DESCRIPTION)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command. An error is one line on stderr and status 2; GPT2_FAST_DEBUG=1 shows where it arose."""
    # Of several processes the first says what is wrong with their options.
    with contextlib.redirect_stderr(sys.stderr if _is_first() else io.StringIO()):
        arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, IndexError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("GPT2_FAST_DEBUG"):
            raise
        return _fail(error)
    except KeyboardInterrupt:
        return 130


def _is_first() -> bool:
    """Whether this process speaks before any have joined. So does one whose variables name no place among several."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not (rank.isdecimal() and world.isdecimal() and 0 < int(rank) < int(world))


def _fail(error: Exception) -> int:
    """One line. Of several processes the first that fails says it, and none waits for the others."""
    group = sys.modules["gpt2_fast.parallel.group"].current() if "gpt2_fast.parallel.group" in sys.modules else None
    speaks = _is_first() if group is None else group.speaks()
    if speaks:
        print(f"gpt2-fast: {error}", file=sys.stderr, flush=True)
    if group is not None and group.world > 1:
        sys.stdout.flush()
        os._exit(2)  # the interpreter's own end would wait for what the processes send each other
    return 2
