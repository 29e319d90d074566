"""The folder that a run writes to, held by a lock in it: where it still is the run's, and where the run writes when it
is not."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from filelock import FileLock, Timeout

from gpt2_fast.checkpoint.run_folder import BEST, NEWEST, is_links_place
from gpt2_fast.train.folder import LOCK, check_new, holds_run


class Taken(Exception):
    """The folder belongs to another run by now."""


class Place:
    """A run's folder, made where it is missing, and its lock, which ends with this process.

    Whoever moves or removes the folder takes the lock with it. So a run asks `check` before it writes: one look at the
    lock's file.

    Args:
        new: the folder is to hold no run yet.

    Raises ValueError, one line, where another run has the folder, it cannot be written, or something in it that is not
    a run's has the name of a link to a checkpoint.
    """

    def __init__(self, out: Path, new: bool = False):
        self.out = out
        self._guard = threading.Lock()  # the thread that saves asks too
        try:
            self._hold()
        except Timeout:
            raise ValueError(f"--out {out} is in use by another run; wait for it, or choose another --out") from None
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written ({error.strerror}); choose another --out") from None
        try:
            if new:
                check_new(out)  # a run may have come and gone since the first look
            elif foreign := [link for link in (out / NEWEST, out / BEST) if not is_links_place(link)]:
                raise ValueError(f"{foreign[0]} is not a run's, and a run would replace it; move it away")
        except ValueError:
            self.release()
            raise

    def _hold(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.out / LOCK, thread_local=False)
        self._lock.acquire(timeout=0)
        self._file, self._folder = _identity(self.out / LOCK), _identity(self.out)

    def check(self) -> bool:
        """Whether the folder was gone, and is made and locked again.

        Raises Taken where another run has it, OSError where it cannot be made again.
        """
        with self._guard:
            there = _identity(self.out / LOCK)
            if there == self._file is not None:
                return False
            same = _identity(self.out) == self._folder
            if same and there is None:  # the lock alone was removed
                return self._hold_again() and False
            if same or holds_run(self.out):
                raise Taken(f"--out {self.out} is another run's by now")
            return self._hold_again()

    def _hold_again(self) -> bool:
        self._lock.release()
        try:
            self._hold()
        except Timeout:
            self._file = None
            raise Taken(f"--out {self.out} is another run's by now") from None
        return True

    def move(self) -> Path:
        """A new folder beside the one that is another run's, locked. Raises OSError."""
        with self._guard:
            taken, i = self.out if self.out.name.strip(".") else Path(os.path.abspath(self.out)), 2  # "." has no name
            while os.path.lexists(taken.with_name(f"{taken.name}-{i}")):
                i += 1
            self._lock.release()
            self.out = taken.with_name(f"{taken.name}-{i}")
            self._hold()
            return self.out

    def release(self) -> None:
        self._lock.release()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino
