"""Signals that ask a run to save and leave: Ctrl-C, and what SLURM, systemd and spot machines send."""

from __future__ import annotations

import contextlib
import signal
import threading

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class Stop:
    """While it is entered, the first of SIGNALS is noted in `asked`, and a second one ends the process at once.

    A signal that is ignored (SIGHUP under nohup) stays ignored.
    """

    def __init__(self):
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is not threading.main_thread():  # only the main one may set handlers
            return self
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.asked = signal.Signals(number).name
        for other in self._before:  # the system's own way, which waits for no step
            signal.signal(other, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            with contextlib.suppress(TypeError, ValueError):
                signal.signal(number, handler)
        self._before.clear()


class Stopped(Exception):
    """Raised inside of what is long, a validation, when `Stop.asked` is set."""
