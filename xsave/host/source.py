"""Where an image is read from: a mapped file, or anything that can only be read forward.

`read(n)` returns exactly n bytes, fewer only at the end of the input. A regular file (also as
standard input) is mapped: `read` returns views, nothing is copied, and a page nobody looks at is
never loaded. A file has holes where a writer skipped zero pages; `zero_pages` tells from them,
without touching the pages, which ones are zero.
"""

from __future__ import annotations

import mmap
import os
import select
import stat
from itertools import pairwise
from typing import Self

import numpy as np

from xsave.errors import StorageError
from xsave.frames import PAGE_SIZE
from xsave.host.oserror import storage_error

_READ_AHEAD = 1 << 18


class Source:
    """What all sources share; `position` counts the bytes of the (decompressed) image read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.position = 0

    @property
    def size(self) -> int | None:
        """Bytes of the whole (decompressed) image; None if only reading can tell."""
        return None

    def read(self, n: int) -> memoryview:
        """Return the next n bytes, fewer only at the end of the input."""
        raise NotImplementedError

    def peek(self, n: int) -> memoryview:
        """Return the first n bytes without consuming them; only before the first `read`."""
        raise NotImplementedError

    def ready(self, wait_s: float = 0.0) -> bool:
        """Return False if a `read` would have to wait for the other end for longer."""
        return True

    @property
    def whole(self) -> memoryview | None:
        """The whole image in memory, nothing of it touched; None if it only comes as it is read.

        It is not to be touched behind the present end of a file that somebody cuts shorter."""
        return None

    def zero_pages(self, offset: int, nr_pages: int) -> np.ndarray | None:
        """Return bool (nr_pages,): True where the page is surely zero, though nobody read it.

        `offset` is that of the first page in the image. None: this source cannot know.
        """
        return None

    def close(self) -> None:
        """Give back what the source holds; views it returned stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileSource(Source):
    """A regular file, mapped from its current position to its end."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(name)
        self._fd = fd
        self._start = os.lseek(fd, 0, os.SEEK_CUR)
        self._end = os.fstat(fd).st_size
        self._extents: tuple[np.ndarray, np.ndarray] | None = None
        self._view = memoryview(b"")
        if self._end > self._start:
            self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
            self._view = memoryview(self._map)[self._start : self._end]

    @property
    def size(self) -> int:
        """Bytes from the place where reading began to the end of the file."""
        return len(self._view)

    @property
    def whole(self) -> memoryview:
        """From the place where reading began; see above. Raises StorageError if the file has been
        cut shorter.

        Who asks for it looks here and there: what lies between is not read ahead (of a hole, that
        would fill the page cache with zeros)."""
        self._check_size(self._end)
        if self._view:
            self._map.madvise(mmap.MADV_RANDOM)
        return self._view

    def read_pages(self, offsets: np.ndarray) -> np.ndarray:
        """Return the pages at these offsets (n,), ascending and apart: (n, 4096) u8."""
        pages = np.empty((offsets.size, PAGE_SIZE), np.uint8)
        offsets = offsets.astype(np.int64) + self._start
        cuts = np.flatnonzero(np.diff(offsets) != PAGE_SIZE) + 1
        for first, end in pairwise([0, *cuts.tolist(), offsets.size]):
            left, position = pages[first:end].reshape(-1).data, int(offsets[first])
            while left:
                try:
                    got = os.preadv(self._fd, [left], position)
                except OSError as error:
                    storage_error(error, self.name, "read")
                if not got:
                    raise self._cut()
                left, position = left[got:], position + got
        return pages

    @property
    def start(self) -> int:
        """Where in the file the image begins."""
        return self._start

    def fileno(self) -> int:
        """The open file."""
        return self._fd

    def with_data(self, offsets: np.ndarray) -> np.ndarray:
        """Return bool (n,): False where the page at an offset lies wholly in a hole. The offsets
        (n,) are those of pages of the image, ascending and apart."""
        if self._extents is None:
            self._extents = _data_extents(self._fd, self._start)
        starts, ends = (np.maximum(edge - self._start, 0) for edge in self._extents)
        offsets = offsets.astype(np.int64)
        # An extent covers the pages from the first that ends behind its start on.
        first = np.searchsorted(offsets, starts - PAGE_SIZE, side="right")
        behind = np.searchsorted(offsets, ends, side="left")
        edges = np.zeros(offsets.size + 1, np.int32)
        np.add.at(edges, first, 1)
        np.subtract.at(edges, behind, 1)
        found: np.ndarray = np.cumsum(edges[:-1]) > 0
        return found

    def read(self, n: int) -> memoryview:
        """Return a view of the next n bytes.

        Touching pages of a mapped file that somebody cut shorter would be the end of the
        process (SIGBUS), so its length is looked at before.
        """
        end = min(self.position + n, len(self._view))
        self._check_size(self._start + end)
        piece = self._view[self.position : end]
        self.position = end
        return piece

    def _check_size(self, least: int) -> None:
        if os.fstat(self._fd).st_size < least:
            raise self._cut()

    def _cut(self) -> StorageError:
        return StorageError(f"{self.name} was cut shorter while it was read", path=self.name)

    def peek(self, n: int) -> memoryview:
        """Return the first n bytes."""
        return self._view[:n]

    def zero_pages(self, offset: int, nr_pages: int) -> np.ndarray | None:
        """Return which pages lie wholly in holes."""
        if self._extents is None:
            self._extents = _data_extents(self._fd, self._start)
        starts, ends = self._extents
        first = self._start + offset + PAGE_SIZE * np.arange(nr_pages)
        if not len(starts):
            return np.ones(nr_pages, bool)
        # The first extent that ends behind the page's first byte: does it begin within the page?
        index = np.searchsorted(ends, first, side="right")
        begins = np.append(starts, np.iinfo(np.int64).max)[index]
        zero: np.ndarray = begins >= first + PAGE_SIZE
        return zero

    def close(self) -> None:
        """Close the file; the map lives as long as views of it do."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._view = memoryview(b"")


def _data_extents(fd: int, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and ends (i64) of the extents with data, from `position` on.

    Two system calls per extent. A file system that knows no holes reports one extent.
    """
    starts, ends = [], []
    before = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        while True:
            starts.append(os.lseek(fd, position, os.SEEK_DATA))
            position = os.lseek(fd, starts[-1], os.SEEK_HOLE)
            ends.append(position)
    except OSError:  # ENXIO: nothing but a hole follows, or the end
        starts = starts[: len(ends)]
    finally:
        os.lseek(fd, before, os.SEEK_SET)
    return np.array(starts, np.int64), np.array(ends, np.int64)


class StreamSource(Source):
    """A pipe, socket, terminal or device: read forward, in reads of at least 256 KiB.

    timeout_s: how long nothing at all may come.
    """

    def __init__(self, fd: int, name: str, timeout_s: float | None = None) -> None:
        super().__init__(name)
        self._fd = fd
        self._timeout_s = timeout_s
        self._ahead = memoryview(b"")

    def read(self, n: int) -> memoryview:
        """Return the next n bytes."""
        if n > len(self._ahead):
            self._fill(n)
        piece, self._ahead = self._ahead[:n], self._ahead[n:]
        self.position += len(piece)
        return piece

    def peek(self, n: int) -> memoryview:
        """Return the first n bytes."""
        if n > len(self._ahead):
            self._fill(n, n)
        return self._ahead[:n]

    def ready(self, wait_s: float = 0.0) -> bool:
        """Return whether something comes within the time; the end of the input counts."""
        return bool(self._ahead) or bool(select.select([self._fd], [], [], wait_s)[0])

    def _fill(self, n: int, room: int = _READ_AHEAD) -> None:
        """Have n bytes ahead, or all there are. Read no more than `room` or n in one go.

        The buffer is never touched before data come: a length that lies costs no memory.
        """
        buffer = np.empty(max(n, room), np.uint8).data
        filled = len(self._ahead)
        buffer[:filled] = self._ahead
        while filled < n and (got := self._readinto(buffer[filled:])):
            filled += got
        self._ahead = buffer[:filled].toreadonly()

    def _readinto(self, buffer: memoryview) -> int:
        while True:
            if self._timeout_s is not None:
                self._wait(self._timeout_s)
            try:
                return os.readv(self._fd, [buffer])
            except BlockingIOError:
                select.select([self._fd], [], [])
            except OSError as error:
                storage_error(error, self.name, "read")

    def _wait(self, timeout_s: float) -> None:
        if not select.select([self._fd], [], [], timeout_s)[0]:
            raise StorageError(f"{self.name}: nothing has come for {timeout_s:g} s", path=self.name)

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_raw(path: str, timeout_s: float | None = None) -> FileSource | StreamSource:
    """Return the source of the bytes of this path, compressed or not; see StreamSource."""
    name = "standard input" if path == "-" else path
    try:
        fd = os.dup(0) if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            os.close(fd)
            raise StorageError(f"cannot read {name}: it is a directory", path=name)
        if stat.S_ISREG(mode):
            return FileSource(fd, name)
        return StreamSource(fd, name, timeout_s)
    except OSError as error:
        storage_error(error, name, "read")
    except ValueError as error:  # a NUL in the name
        raise StorageError(f"cannot read {name!r}: {error}", path=name) from error
