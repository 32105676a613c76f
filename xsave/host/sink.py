"""Where an image is written to: a file that appears only when it is complete, or a descriptor.

`write(buffers)` takes what image/ makes: bytes, memoryviews, numpy arrays, `Zeros(n)`, `Rows`. It
is done with the buffers when it returns. In a file zeros are skipped: a hole reads back as zeros,
and the bytes are those any Xen reads; a pipe gets them written.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn, Self

import numpy as np

from xsave.errors import StorageError
from xsave.host.newfile import NewFile
from xsave.host.oserror import storage_error
from xsave.image.buffers import Buffer, Rows, Zeros, nbytes
from xsave.vectors import behind, row_vectors, write_vectors

_ZEROS = memoryview(bytes(1 << 20))
#: Fewer zeros than this are written: their hole would free few blocks and cost a system call.
_MIN_HOLE_BYTES = 16 << 10
#: The disk is set to work each time so much was written, that `commit` has less to wait for.
_WRITEBACK_BYTES = 16 << 20
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)


class Sink:
    """What all sinks share; leaving the `with` without `commit` is an abort."""

    #: Whether it pays to look for zero pages and hand them over as Zeros.
    wants_zeros = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.position = 0  # bytes of the stream so far

    def write(self, buffers: Iterable[Buffer]) -> None:
        """Append these buffers to the stream."""
        raise NotImplementedError

    def precheck(self, needed: int) -> None:
        """Raise StorageError if that many bytes will not fit, where that can be known."""

    def commit(self) -> None:
        """Finish: all that was written is safe when this returns."""

    def abort(self) -> None:
        """Give up: leave nothing behind that looks like an image. A no-op after commit."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


class FileSink(Sink):
    """A regular file that gets its name last (newfile.py)."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        target = os.path.realpath(path)  # a symbolic link stays one
        self._directory = os.path.dirname(target)  # noqa: PTH120
        self._flushed = 0  # up to where the disk was told to begin
        try:
            self._file = NewFile(target)
        except (OSError, ValueError) as error:
            self._fail(error)

    def write(self, buffers: Iterable[Buffer]) -> None:
        """Append the buffers; zeros become holes."""
        try:
            for part in _parts(list(buffers), _MIN_HOLE_BYTES):
                if isinstance(part, Zeros):
                    self.position += part.nbytes
                else:
                    self._write_all(vectors(part))
                    self._start_writeback()
        except OSError as error:
            self._fail(error)

    def _write_all(self, left: np.ndarray) -> None:
        while len(left):
            written = write_vectors(self._file.fd, left, self.position)
            self.position += written
            left = behind(left, written)

    def _start_writeback(self) -> None:
        """A mere hint, of no meaning on a file system in memory: its failure is no error."""
        fresh = self.position - self._flushed
        if fresh >= _WRITEBACK_BYTES and hasattr(_libc, "sync_file_range"):
            start, length = ctypes.c_int64(self._flushed), ctypes.c_int64(fresh)
            _libc.sync_file_range(self._file.fd, start, length, _SYNC_FILE_RANGE_WRITE)
            self._flushed = self.position

    def precheck(self, needed: int) -> None:
        """Raise StorageError unless the file system has that many bytes free."""
        if (free := self._free_bytes()) < needed:
            self._no_space(free, needed)

    def commit(self) -> None:
        """Give the file its length, put it on disk and in its place, and the name on disk too."""
        try:
            os.ftruncate(self._file.fd, self.position)  # it may end in a hole
            self._file.commit()
        except OSError as error:
            self._fail(error)

    def abort(self) -> None:
        """Leave nothing of it."""
        self._file.close()

    def _free_bytes(self) -> int:
        try:
            found = os.statvfs(self._directory)
        except OSError as error:
            self._fail(error)
        return found.f_bavail * found.f_frsize

    def _fail(self, error: OSError | ValueError) -> NoReturn:
        if not isinstance(error, OSError):
            raise StorageError(f"cannot write {self.name!r}: {error}") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            self._no_space(self._free_bytes(), None, error)
        storage_error(error, self.name, "write")

    def _no_space(self, free: int, needed: int | None, error: OSError | None = None) -> NoReturn:
        more = f"{needed} bytes are needed" if needed else f"it ended at byte {self.position}"
        reason = error.strerror if error else "not enough space"
        message = f"cannot write {self.name}: {reason}: {free} bytes are free, {more}"
        facts = {"path": self.name, "free_bytes": free, "needed_bytes": needed or self.position}
        raise StorageError(message, **facts) from error


class DescriptorSink(Sink):
    """A pipe, a device, standard output: written straight, closed by commit and abort.

    timeout_s: for how long a pipe or socket may take nothing at all.
    """

    wants_zeros = False

    def __init__(self, fd: int, name: str, timeout_s: float | None = None) -> None:
        super().__init__(name)
        self._fd = fd
        self._timeout_s = timeout_s
        if timeout_s is not None:
            os.set_blocking(fd, False)

    def write(self, buffers: Iterable[Buffer]) -> None:
        """Append the buffers; zeros are written."""
        for part in _parts(list(buffers), len(_ZEROS) + 1):
            if isinstance(part, Zeros):
                whole, rest = divmod(part.nbytes, len(_ZEROS))
                self._write_all(vectors([*[_ZEROS] * whole, _ZEROS[:rest]]))
            else:
                self._write_all(vectors(part))

    def _write_all(self, left: np.ndarray) -> None:
        while len(left):
            try:
                written = write_vectors(self._fd, left)
            except BlockingIOError:
                if not select.select([], [self._fd], [], self._timeout_s)[1]:
                    message = f"{self.name} has taken nothing for {self._timeout_s:g} s"
                    raise StorageError(message, path=self.name) from None
                continue
            except OSError as error:
                storage_error(error, self.name, "write")
            self.position += written
            left = behind(left, written)

    def commit(self) -> None:
        """Put it on disk where there is one, and close: a pipe acknowledges nothing more."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
                storage_error(error, self.name, "write")
        fd, self._fd = self._fd, -1
        try:
            os.close(fd)
        except OSError as error:
            storage_error(error, self.name, "write")

    def abort(self) -> None:
        """Close; what was written is written."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _parts(buffers: Sequence[Buffer], min_hole: int) -> Iterator[list[Buffer] | Zeros]:
    """Yield lists of buffers that are written together, and the Zeros between them.

    Zeros of less than min_hole bytes (at most 1 MiB) are buffers to write too.
    """
    together: list[Buffer] = []
    for buffer in buffers:
        if not isinstance(buffer, Zeros):
            together.append(buffer)
        elif buffer.nbytes < min_hole:
            together.append(_ZEROS[: buffer.nbytes])
        else:
            yield together
            yield buffer
            together = []
    yield together


def vectors(buffers: Sequence[Buffer]) -> np.ndarray:
    """Return the iovecs of these buffers, (n, 2) u64: address and length, none of them empty.

    They hold no reference: the buffers must live, and stay where they are, while they are used.
    """
    parts = [np.empty((0, 2), np.uint64)]
    for buffer in buffers:
        if isinstance(buffer, Rows):
            parts.append(row_vectors(buffer.source, buffer.index))
        elif nbytes(buffer):
            address = np.frombuffer(buffer, np.uint8).ctypes.data
            parts.append(np.array([[address, nbytes(buffer)]], np.uint64))
    return np.concatenate(parts)
