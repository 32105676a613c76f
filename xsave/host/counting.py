"""How many bytes a second get to another host, tried: its end counts what comes and says so.

    receiver -> sender  COUNTING
    sender -> receiver  bytes, for a moment
    receiver -> sender  one byte for each PIECE_BYTES of them

For `migrate --dry-run`: nothing of the guest goes there. The bytes are such as no ssh compresses.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import TYPE_CHECKING

from xsave.errors import ConnectionLost
from xsave.host import handshake

if TYPE_CHECKING:
    from xsave.host.transport import Channel

COUNTING = b"xsave migration receiver, counting what comes\n"
PIECE_BYTES = 1 << 18
_LONGEST_S, _MOST_PIECES = 0.5, 1024
#: From the last byte sent to the last one counted: a slow link has a lot on its way.
_ANSWER_TIMEOUT_S = 60.0
_COUNTED = b"+"
#: Who listens at a socket has others to wait for.
_SILENCE_S = 60.0


def count(incoming: int, outgoing: int) -> None:
    """Be the far end, until nothing more comes. Raises ConnectionLost."""
    handshake.send(outgoing, COUNTING, "the greeting")
    buffer, so_far = bytearray(PIECE_BYTES), 0
    with contextlib.suppress(ConnectionResetError):
        while nr := _read(incoming, buffer):
            so_far += nr
            handshake.send(outgoing, _COUNTED * (so_far // PIECE_BYTES), "the count")
            so_far %= PIECE_BYTES


def _read(fd: int, buffer: bytearray) -> int:
    if not select.select([fd], [], [], _SILENCE_S)[0]:
        raise ConnectionLost(f"the other end has sent nothing for {_SILENCE_S:g} s")
    return os.readv(fd, [buffer])


def measure(channel: Channel, output: int) -> float:
    """Return how many bytes a second are counted at the other end of an empty channel.

    Raises StorageError."""
    piece = os.urandom(PIECE_BYTES)
    began, nr = time.monotonic(), 0
    while nr < _MOST_PIECES and time.monotonic() - began < _LONGEST_S:
        channel.write([piece])
        nr += 1
    handshake.receive(output, nr, "what it has counted", _ANSWER_TIMEOUT_S)
    return nr * PIECE_BYTES / (time.monotonic() - began)
