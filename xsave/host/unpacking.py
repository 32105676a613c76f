"""A kernel file, unpacked by a thread while the process that wants it loads the emulator.

Nothing of the emulator is imported here, nor numpy: it begins before they are there.
"""

from __future__ import annotations

import threading
from pathlib import Path

from xsave.errors import HostCannotTake, StorageError
from xsave.guest.xen.bzimage import unwrap

MAX_FILE_BYTES = 1 << 30


def read_file(path: str) -> bytes:
    """Read a kernel or a ramdisk. Raises StorageError, HostCannotTake."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise StorageError(f"{path}: {e.strerror}") from e
    if len(data) > MAX_FILE_BYTES:
        raise HostCannotTake(f"{path}: {len(data)} bytes: expected at most {MAX_FILE_BYTES}")
    return data


def unpack(path: str) -> bytes | memoryview:
    """Return the ELF kernel in a file, or what else is in it. Raises StorageError,
    HostCannotTake."""
    return unwrap(read_file(path), path)


class Unpacking:
    """unpack(path), which has begun."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._unpacked: bytes | memoryview = b""
        self._trouble: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._unpacked = unpack(self.path)
        except BaseException as e:  # noqa: BLE001 - result() raises it
            self._trouble = e

    def result(self) -> bytes | memoryview:
        """Wait for it. Raises what unpack() does."""
        self._thread.join()
        if self._trouble is not None:
            raise self._trouble
        return self._unpacked
