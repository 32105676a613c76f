"""What the writers of an image hand to a sink: a list of buffers, some of them only promised.

A buffer is anything that `os.writev` takes (bytes, memoryview, a contiguous numpy array) or a
`Zeros(n)`, which stands for n zero bytes: a file sink seeks over it (a hole), a pipe writes
it. A leaf of image/: it imports neither numpy nor construct, so that sinks stay cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

#: Exactly n bytes; fewer only at the end of the input.
Read = Callable[[int], memoryview]


@dataclass(frozen=True)
class Zeros:
    """A stand-in for `nbytes` zero bytes."""

    nbytes: int


@dataclass(frozen=True, eq=False)
class Rows:
    """A stand-in for the rows `index` (k,) u64 of a C-contiguous array `source` (n, m), in order.

    Whoever takes it gathers them, or need not.
    """

    source: Any
    index: Any

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(self.source.strides[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return len(self.index) * self.row_bytes

    def gather(self) -> Any:
        """Return a copy of the rows, (k, m)."""
        return self.source.take(self.index, axis=0)


Buffer = Any  # bytes | memoryview | numpy.ndarray | Zeros | Rows; numpy is not imported here
Write = Callable[[Iterable[Buffer]], None]


def nbytes(buffer: Buffer) -> int:
    """Return how many bytes of the stream a buffer stands for."""
    size = getattr(buffer, "nbytes", None)
    return len(buffer) if size is None else int(size)


def reader(data: bytes | memoryview) -> Read:
    """Return a read callable over bytes in memory (tests, small images)."""
    view = memoryview(data)
    position = 0

    def read(n: int) -> memoryview:
        nonlocal position
        piece = view[position : position + n]
        position += len(piece)
        return piece

    return read
