"""What a run shows of its steps: a bar on a terminal, elsewhere a line every few steps, with --quiet neither."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from gpt2_fast.train.say import Unfailing, attempt, say


class Progress:
    """Shows the steps of a run on stderr.

    Args:
        total, initial: steps of the run, and those that were done before.
        every: steps between lines where stderr is no terminal; the first and the last step have one too.
        silent: show nothing, and say errors alone.
    """

    def __init__(self, total: int, initial: int, every: int, silent: bool = False):
        terminal = not silent and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
        flushes = [stream.flush for stream in (sys.stderr, sys.stdout) if stream is not None]
        if terminal and all(map(attempt, flushes)):  # tqdm calls them too, as it begins, and unguarded
            stream = Unfailing(sys.stderr)
            self._bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, file=stream)
        else:
            self._bar = None
        self._total, self._initial, self._every, self._lines = total, initial, every, not silent and self._bar is None
        self._started = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """One more step is on its way."""
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, loss: float, lr: float, rate: float) -> None:
        """The numbers of a step that is done. rate: tokens a second."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {rate:,.0f} tok/s")
        elif self._lines and (step % self._every == 0 or step in (self._initial + 1, self._total)):
            each = (time.perf_counter() - self._started) / (step - self._initial)
            left = tqdm.format_interval(each * (self._total - step))
            say(f"step {step}/{self._total}, loss {loss:.4f}, lr {lr:.2e}, {rate:,.0f} tok/s, {left} left", "stderr")

    def write(self, text: str, to: str = "stdout") -> None:
        """A line, above the bar where there is one."""
        if self._bar is not None:
            attempt(lambda: self._bar.write(text, file=getattr(sys, to)))
        else:
            say(text, to)


class Voice:
    """`say` of a run: in the first process; with --quiet, what goes to stderr alone."""

    def __init__(self, first: bool, quiet: bool):
        self._first, self._quiet = first, quiet

    def __call__(self, text: str, bar: Progress | None = None, to: str = "stdout") -> None:
        """bar: the line goes above it."""
        if self._first and (to == "stderr" or not self._quiet):
            say(text, to) if bar is None else bar.write(text, to)
