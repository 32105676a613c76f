"""A sink that goes no faster than it may: --bandwidth."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import numpy as np

from xsave.host.sink import Sink
from xsave.image.buffers import Buffer, Rows, Zeros, nbytes

#: Written at once, at most: so much of a second's bytes.
_PIECE_S = 0.05
_MIN_PIECE_BYTES = 1 << 14
#: A pause is not made up for by more than so much afterwards.
_MAX_CREDIT_S = 0.1


class PacedSink(Sink):
    """Hands its buffers on in pieces, bytes_per_s on average."""

    def __init__(self, sink: Sink, bytes_per_s: float) -> None:
        super().__init__(sink.name)
        self._sink = sink
        self._rate = bytes_per_s
        self._piece = max(int(bytes_per_s * _PIECE_S), _MIN_PIECE_BYTES)
        self._due = time.monotonic()

    def write(self, buffers: Iterable[Buffer]) -> None:
        """Write the buffers, and sleep in between."""
        for buffer in buffers:
            for piece in cut(buffer, self._piece):
                self._sink.write([piece])
                self.position = self._sink.position
                now = time.monotonic()
                self._due = max(self._due, now - _MAX_CREDIT_S) + nbytes(piece) / self._rate
                if self._due > now:
                    time.sleep(self._due - now)

    def commit(self) -> None:
        self._sink.commit()

    def abort(self) -> None:
        self._sink.abort()


def cut(buffer: Buffer, size: int) -> Iterator[Buffer]:
    """Cut a buffer into pieces of at most so many bytes (but no row of Rows)."""
    if isinstance(buffer, Zeros):
        for start in range(0, buffer.nbytes, size):
            yield Zeros(min(size, buffer.nbytes - start))
    elif isinstance(buffer, Rows):
        nr = max(size // buffer.row_bytes, 1)
        for start in range(0, len(buffer.index), nr):
            yield Rows(buffer.source, buffer.index[start : start + nr])
    elif nbytes(buffer):
        data = np.frombuffer(buffer, np.uint8)
        for start in range(0, data.size, size):
            yield data[start : start + size]
