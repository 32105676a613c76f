"""What a run of the torture has found so far, as JSON lines: it can be stopped and resumed.

    {"torture": 1, "kernel": ..., "seed": ..., "max_points": ..., "every": ..., "threads": ...}
    {"sweep": ..., "window": ..., ...}
    {"at": ..., "fate": ..., ...}

A run that was killed may have left half a line at the end; it is dropped.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from xsave.errors import StorageError, UsageError
from xsave.torture.settings import Settings

VERSION = 1


class Journal:
    """The lines of one run, in memory and, with a path, in a file. Raises StorageError."""

    def __init__(self, settings: Settings, path: Path | None) -> None:
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.points: dict[str, dict[str, Any]] = {}
        self._file = None
        head = header(settings)
        if path is None:
            return
        try:
            known = self._load(path, head) if path.exists() else 0
            self._file = path.open("r+b" if known else "wb")
            self._file.truncate(known)
            self._file.seek(known)
        except OSError as e:
            raise StorageError(f"{path}: {e.strerror}") from e
        if not known:
            self._write(head)

    def _load(self, path: Path, head: dict[str, Any]) -> int:
        """Take over what a file holds; return how many of its bytes are whole lines."""
        data = path.read_bytes()
        known = data.rfind(b"\n") + 1
        lines = data[:known].splitlines()
        try:
            records = [json.loads(line) for line in lines]
        except ValueError as e:
            raise UsageError(f"{path} is no journal of a torture") from e
        if records and records[0] != head:
            raise UsageError(
                f"{path} is the journal of another run: expected {json.dumps(head)}, found "
                f"{json.dumps(records[0])}"
            )
        for record in records[1:]:
            self._take(record)
        return known

    def _take(self, record: dict[str, Any]) -> None:
        if "at" in record:
            self.points[record["at"]] = record
        else:
            self.sweeps[record["sweep"]] = record

    def add(self, record: dict[str, Any]) -> None:
        """Take one line of a worker."""
        self._take(record)
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        except OSError as e:
            raise StorageError(f"{self._file.name}: {e.strerror}") from e

    def done(self, sweep: str) -> set[int]:
        """Return the numbers of a sweep's points that were tried."""
        prefix = sweep + "/"
        return {int(at[len(prefix) :]) for at in self.points if at.startswith(prefix)}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def header(settings: Settings) -> dict[str, Any]:
    """What must be the same for two runs to be one."""
    kernel = hashlib.sha256(Path(settings.kernel).read_bytes()).hexdigest()
    return {
        "torture": VERSION,
        "kernel": kernel,
        "seed": settings.seed,
        "max_points": settings.max_points,
        "every": settings.every,
        "threads": settings.threads,
        "quick": settings.quick,
    }
