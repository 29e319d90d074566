"""metrics.jsonl: one JSON object a line, of a step or of a validation, each of them once."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from gpt2_fast.files import atomic_write
from gpt2_fast.train.say import say


class MetricsLog:
    """The log of a run. A line is in the file whole or not at all; what the disk has no room for waits in memory."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting = b""
        self._failed = False

    def read(self) -> list[dict[str, Any]]:
        """The records. A last line that a crash tore is left out."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise ValueError
            except (ValueError, RecursionError):
                if number == len(lines):
                    break
                raise ValueError(
                    f"{self.path} is damaged at line {number}; remove that line, or move the file away"
                ) from None
            records.append(record)
        return records

    def up_to(self, step: int) -> list[dict[str, Any]]:
        """The records without those of later steps, which run again, and without what stands twice."""
        records = {}
        for record in self.read():
            if record["step"] <= step:
                records.setdefault((record["step"], "loss" in record), record)
        return list(records.values())

    def keep(self, records: list[dict[str, Any]]) -> None:
        """Takes all other records from the file."""
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records))

    def write(self, **record: Any) -> None:
        """Adds a line. Where the disk has no room for it, says so once and tries again at the next."""
        self._waiting += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            self._append()
        except OSError as error:
            if not self._failed:
                say(
                    f"cannot write {self.path} ({error.strerror or error}): its lines wait in memory; "
                    "training goes on, make room",
                    "stderr",
                )
            self._failed = True
        else:
            self._failed = False

    def _append(self) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(file).st_size
            try:
                rest = self._waiting
                while rest:
                    rest = rest[os.write(file, rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, before)  # no torn line
                raise
            self._waiting = b""
        finally:
            os.close(file)

    def settle(self) -> None:
        """Brings the file to the disk, so that no checkpoint is newer than its log. Raises OSError."""
        if self._waiting:
            self._append()
        if self.path.exists():
            file = os.open(self.path, os.O_RDWR)
            try:
                os.fsync(file)
            finally:
                os.close(file)
