"""What ends a run before its last step: signals that ask it to save and leave (Ctrl-C, and what SLURM, systemd and spot
machines send), and faults. Several processes agree on it."""

from __future__ import annotations

import contextlib
import signal
import threading

from gpt2_fast.parallel.group import Group

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
    """Raised inside of what is long, a validation, when the run is to end."""


class Ending:
    """Whether and why a run ends, as far as all of its processes know. They come to know it in `agree`.

    Attributes:
        stop: the signals to this process.
        fault: what ends the run, in this process.
        failing: whether a process has a fault.
    """

    def __init__(self, group: Group):
        self._group = group
        self.stop = Stop()
        self.fault: Exception | None = None
        self.failing = False
        self._agreed: str | None = None

    @property
    def asked(self) -> str | None:
        """The signal that asks the run to end; with several processes, as far as all of them know of it."""
        return self.stop.asked if self._group.world == 1 else self._agreed

    @property
    def due(self) -> bool:
        """Whether no more steps are to be taken: a signal has come, or a process has a fault."""
        return self.failing or self.asked is not None

    def agree(self, late: bool = False) -> bool:
        """Makes a signal to any process, or a fault of it, known to all. Returns whether the first one says `late`."""
        mine = self.stop.asked
        asked, late, failing = self._group.agree(
            signal.Signals[mine] if mine else 0, int(late and self._group.first), int(self.fault is not None)
        )
        self.failing = self.failing or bool(failing)
        if asked:
            self._agreed = signal.Signals(asked).name
        return bool(late)
