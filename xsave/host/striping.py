"""One stream over several connections: cut into pieces that take turns, and joined again.

    piece k goes over connection k mod N:  length (u32, little-endian), then so many bytes

What is joined is byte for byte what was cut: neither the image nor the messages behind it know of
this, and no page can overtake another. One connection is slower than the link where a window or
one core's cipher bounds it.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xsave.errors import ConnectionLost, StorageError, UsageError
from xsave.host.pacing import cut
from xsave.host.sink import Sink
from xsave.host.source import StreamSource
from xsave.image.buffers import Buffer, nbytes

MAX_CONNECTIONS = 16
_PIECE_BYTES = 256 << 10
_LENGTH = struct.Struct("<I")
#: How long the connections of one migration may take until all are there.
GATHER_TIMEOUT_S = 30.0
_RETRY_S = 0.02
_PART = re.compile(r"([0-9a-f]{16})/(\d{1,2})/(\d{1,2})\Z")


@dataclass(frozen=True)
class Part:
    """Which connection of which migration one is; number 0 has the conversation."""

    token: str
    number: int
    count: int

    @staticmethod
    def parse(text: str) -> Part:
        """Raises UsageError."""
        match = _PART.match(text)
        part = Part(match[1], int(match[2]), int(match[3])) if match else None
        if part is None or not part.number < part.count <= MAX_CONNECTIONS:
            raise UsageError(f"{text!r}: expected ID/NUMBER/COUNT")
        return part

    @staticmethod
    def of(count: int) -> list[Part]:
        """Return the parts of a new migration."""
        token = os.urandom(8).hex()
        return [Part(token, number, count) for number in range(count)]

    def __str__(self) -> str:
        return f"{self.token}/{self.number}/{self.count}"


class StripingSink(Sink):
    """Writes to its sinks in turn."""

    wants_zeros = False

    def __init__(self, sinks: Sequence[Sink]) -> None:
        super().__init__(sinks[0].name)
        self._sinks = sinks
        self._turn = 0

    def write(self, buffers: Iterable[Buffer]) -> None:
        together: list[Buffer] = []
        size = 0
        for buffer in buffers:
            for piece in cut(buffer, _PIECE_BYTES):
                if size + nbytes(piece) > _PIECE_BYTES:
                    self._write_piece(together, size)
                    together, size = [], 0
                together.append(piece)
                size += nbytes(piece)
        self._write_piece(together, size)

    def _write_piece(self, together: list[Buffer], size: int) -> None:
        if size:
            self._sinks[self._turn].write([_LENGTH.pack(size), *together])
            self._turn = (self._turn + 1) % len(self._sinks)
            self.position = sum(sink.position for sink in self._sinks)

    def abort(self) -> None:
        for sink in self._sinks:
            sink.abort()


class StripedSource(StreamSource):
    """Reads from its descriptors in turn, which are its own from then on."""

    def __init__(self, fds: Sequence[int], name: str, timeout_s: float | None = None) -> None:
        super().__init__(fds[0], name, timeout_s)
        self._fds = fds
        self._turn = 0
        self._left = 0  # of the piece that is being read

    def _readinto(self, buffer: memoryview) -> int:
        if not self._left and not self._begin_piece():
            return 0
        got = super()._readinto(buffer[: self._left])
        self._left -= got
        if not self._left:
            self._turn = (self._turn + 1) % len(self._fds)
            self._fd = self._fds[self._turn]
        return got

    def _begin_piece(self) -> bool:
        """Read the next piece's length; False at the end of the input."""
        header = bytearray(_LENGTH.size)
        filled = 0
        while filled < len(header):
            if not (got := super()._readinto(memoryview(header)[filled:])):
                return False
            filled += got
        (self._left,) = _LENGTH.unpack(header)
        if not 0 < self._left <= _PIECE_BYTES:
            raise StorageError(
                f"{self.name}: a piece of {self._left} bytes: expected 1 to {_PIECE_BYTES}"
            )
        return True

    def close(self) -> None:
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds, self._fd = [], -1


class Gathering:
    """The other connections of one migration, as its number 0 collects them: `fds`, in order.

    Each is of a process that ends when this one does, or closes the gathering: ssh ends a
    connection with the process it was for, and the sender hears of it.
    """

    def __init__(self, directory: Path, part: Part) -> None:
        """Wait for all of them. Raises ConnectionLost, StorageError."""
        self._socks: list[socket.socket] = []
        self.fds: list[int] = []
        found: dict[int, int] = {}
        try:
            with _listening(directory, part) as listener:
                while len(found) < part.count - 1:
                    number, fd = self._accept(listener)
                    if not 0 < number < part.count or number in found:
                        raise StorageError(f"connection {number} of {part.count} comes twice")
                    found[number] = fd
        except TimeoutError:
            self.close()
            raise ConnectionLost(
                f"only {len(found) + 1} of {part.count} connections within {GATHER_TIMEOUT_S:g} s"
            ) from None
        except (OSError, ValueError) as e:
            self.close()
            raise StorageError(f"cannot gather {part.count} connections: {e}") from e
        self.fds = [found[number] for number in sorted(found)]

    def _accept(self, listener: socket.socket) -> tuple[int, int]:
        sock, _ = listener.accept()
        self._socks.append(sock)
        message, fds, _, _ = socket.recv_fds(sock, 16, 1)
        return int(message), fds[0] if fds else -1

    def close(self) -> None:
        """Let the processes go."""
        for sock in self._socks:
            sock.close()


@contextlib.contextmanager
def _listening(directory: Path, part: Part) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener, _meeting_point(directory, part) as address:
        listener.settimeout(GATHER_TIMEOUT_S)
        listener.bind(address)
        try:
            listener.listen(part.count)
            yield listener
        finally:
            os.unlink(address)  # noqa: PTH108 - no path of a file system, but of a descriptor


def join(directory: Path, part: Part, fd: int) -> None:
    """Give a descriptor to number 0 of this migration; return when that is done with it, or its
    other end is gone. Raises ConnectionLost."""
    deadline = time.monotonic() + GATHER_TIMEOUT_S
    with socket.socket(socket.AF_UNIX) as sock:
        while True:
            try:
                with _meeting_point(directory, part) as address:
                    sock.connect(address)
                socket.send_fds(sock, [str(part.number).encode()], [fd])
                break
            except OSError as e:
                if time.monotonic() > deadline:
                    raise ConnectionLost(f"connection {part.number}: nobody waits for it") from e
                time.sleep(_RETRY_S)
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(fd, select.POLLRDHUP)
        poll.poll()


@contextlib.contextmanager
def _meeting_point(directory: Path, part: Part) -> Iterator[str]:
    """Give a socket address that is short enough for any directory."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/join-{part.token}"
    finally:
        os.close(fd)
