"""A disk's file: opened, locked, and read and written at offsets, all or nothing.

The lock is flock(2)'s: exclusive for who writes, shared for who only reads, gone with the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from xsave.errors import StorageError

_MAX_VECTORS = 1024


class DiskFile:
    """An open file. Methods raise OSError; a read behind the end gives zeros."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self.path = path

    @classmethod
    def open(cls, path: str, *, readonly: bool, lock: bool = True) -> DiskFile:
        """Raises StorageError: it is not there, no file, not ours, or in use."""
        flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(path, flags)
        except OSError as e:
            raise StorageError(f"disk {path}: {e.strerror}", path=path) from e
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise StorageError(f"disk {path}: neither a file nor a block device", path=path)
            if lock:
                fcntl.flock(fd, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(fd)
            raise StorageError(f"disk {path}: it is in use by another domain", path=path) from e
        except OSError as e:
            os.close(fd)
            raise StorageError(f"disk {path}: it cannot be locked: {e.strerror}", path=path) from e
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path)

    @property
    def size(self) -> int:
        """Bytes; of a block device too."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(os.fstat(self._fd).st_mode)

    def read(self, offset: int, buffers: list[memoryview]) -> None:
        """Fill the buffers."""
        left = list(buffers)
        while left:
            got = os.preadv(self._fd, left[:_MAX_VECTORS], offset)
            if not got:
                for view in left:
                    view[:] = bytes(len(view))
                return
            offset += got
            left = _behind(left, got)

    def write(self, offset: int, buffers: list[memoryview]) -> None:
        """Write the buffers."""
        left = list(buffers)
        while left:
            done = os.pwritev(self._fd, left[:_MAX_VECTORS], offset)
            if not done:
                raise OSError(errno.EIO, "nothing was written")
            offset += done
            left = _behind(left, done)

    def read_bytes(self, offset: int, nr: int) -> bytearray:
        """Return nr bytes."""
        data = bytearray(nr)
        self.read(offset, [memoryview(data)])
        return data

    def write_bytes(self, offset: int, data: bytes | bytearray) -> None:
        """Write all of data."""
        self.write(offset, [memoryview(data)])

    def sync(self) -> None:
        """What was written is on the disk when this returns."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close it; the lock goes with it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _behind(buffers: list[memoryview], nr: int) -> list[memoryview]:
    """What is left of the buffers behind nr bytes."""
    for i, view in enumerate(buffers):
        if nr < len(view):
            return [view[nr:], *buffers[i + 1 :]]
        nr -= len(view)
    return []
