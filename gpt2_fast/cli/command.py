"""The command line as a whole, and how a command ends."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import difflib
import functools
import importlib.metadata
import io
import os
import platform
import select
import sys

from gpt2_fast.cli import convert, doctor, evaluate, generate, inspect, recipe, train
from gpt2_fast.train.config import OTHER_NAMES

DESCRIPTION = "GPT-2 training and generation through fused kernels, exact to Hugging Face's GPT-2."
COMMANDS = (train, generate, evaluate, inspect, doctor, convert, recipe)  # in the order of --help


def parser() -> argparse.ArgumentParser:
    """The command line, whole."""
    top = argparse.ArgumentParser(prog="gpt2-fast", description=DESCRIPTION)
    top.add_argument(
        "--version",
        action=Version,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the versions of gpt2_fast, torch and Python",
    )
    # Without abbreviations: --prompt would be taken for --prompt-file.
    commands = top.add_subparsers(
        dest="command", metavar="COMMAND", parser_class=functools.partial(argparse.ArgumentParser, allow_abbrev=False)
    )
    for module in COMMANDS:
        module.add(commands)
    recipe.add_fetch(commands)
    return top


class Version(argparse.Action):
    """Prints versions as they are installed, without importing torch."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        version = sys.modules["gpt2_fast"].__version__  # the package that this module is in
        try:
            torch = importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:
            torch = "not installed"
        print(f"gpt2-fast {version} (torch {torch}, Python {platform.python_version()})")
        parser.exit()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of one command. A wrong option is answered by the usage of its own command; no command, by help."""
    top = parser()
    arguments, unknown = top.parse_known_args(argv)
    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction)).choices
    if arguments.command is None and not unknown:
        top.print_help()
        top.exit()
    command = commands.get(arguments.command, top)
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(command, unknown)}")
    return arguments


def _meant(command: argparse.ArgumentParser, unknown: list[str]) -> str:
    """The options that come nearest to mistyped ones, as words to add."""
    known = [option for action in command._actions for option in action.option_strings]
    typed = (word.partition("=")[0] for word in unknown if word.startswith("-"))
    nearest = [
        match for word in typed for match in (_synonym(word, known) or difflib.get_close_matches(word, known, 1))
    ]
    return f" (did you mean {', '.join(nearest)}?)" if nearest else ""


def _synonym(word: str, known: list[str]) -> list[str]:
    """The option of a command that goes by another name elsewhere."""
    ours = "--" + OTHER_NAMES.get(word.strip("-").replace("-", "_"), "").replace("_", "-")
    return [ours] if ours in known else []


def main(argv: list[str] | None = None) -> int:
    """Runs one command. An error is one line on stderr and status 2; GPT2_FAST_DEBUG=1 shows where it arose.

    Where what it prints is no longer read, as by `head`, it ends without a word, with the status of SIGPIPE in a shell.
    """
    _open_closed()
    try:
        # Of several processes the first says what is wrong with their options.
        with contextlib.redirect_stderr(sys.stderr if _is_first() else io.StringIO()):
            arguments = parse(argv)
    except (SystemExit, BrokenPipeError):
        if _nobody_reads():
            return 141
        raise
    try:
        status = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it is known what to do when nobody reads it
        return status
    except BrokenPipeError as error:
        return 141 if _nobody_reads() else _fail(error)
    except (ValueError, IndexError, OSError, RuntimeError, FloatingPointError) as error:
        error = _unprintable(error) or error
        if os.environ.get("GPT2_FAST_DEBUG"):
            raise
        return _fail(error, getattr(arguments, "offline", None))
    except KeyboardInterrupt:
        return 130


def _open_closed() -> None:
    """Standard streams that are closed (2>&-) go nowhere: the next file that is opened would get their number, and
    what a library says there."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process


def _nobody_reads() -> bool:
    """Whether stdout is a pipe without a reader. What is left for it then goes nowhere, or Python would complain."""
    try:
        waiting = select.poll()
        waiting.register(sys.stdout.fileno(), 0)
        if not any(event & select.POLLERR for _, event in waiting.poll(0)):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # Windows has no poll; a stdout that is none, or is no file
        return False
    return True


def _unprintable(error: Exception) -> ValueError | None:
    """For text that stdout's encoding does not have, an error that says so: another character would be another text."""
    encoding = getattr(sys.stdout, "encoding", None)
    if not isinstance(error, UnicodeEncodeError) or encoding is None:
        return None
    try:
        names = codecs.lookup(encoding).name, encoding, "charmap", "latin-1"
    except LookupError:  # a stdout that somebody put there
        return None
    if error.encoding not in names:
        return None
    fix = "PYTHONIOENCODING=utf-8:surrogateescape" if error.encoding == "utf-8" else "PYTHONIOENCODING=utf-8"
    return ValueError(f"stdout is {encoding}, which has no {error.object[error.start]!a}; set {fix}")


def _is_first() -> bool:
    """Whether this process speaks before any have joined. So does one whose variables name no place among several."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not (rank.isdecimal() and world.isdecimal() and 0 < int(rank) < int(world))


def _fail(error: Exception, offline: str | None = None) -> int:
    """One line. Of several processes the first that fails says it, and none waits for the others.

    offline: what the command can do where a hub model is not in the cache and the hub was not reached.
    """
    group = sys.modules["gpt2_fast.parallel.group"].current() if "gpt2_fast.parallel.group" in sys.modules else None
    speaks = _is_first() if group is None else group.speaks()
    if speaks:
        more = f"; {offline}" if offline and getattr(error, "not_reached", False) else ""
        with contextlib.suppress(OSError, ValueError):  # a stderr that cannot be written
            print(f"gpt2-fast: {error}{more}", file=sys.stderr, flush=True)
    if group is not None and group.world > 1:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(2)  # the interpreter's own end would wait for what the processes send each other
    return 2
