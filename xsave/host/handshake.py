"""The conversation of xl migrate, byte for byte (tools/xl/xl_migrate.c), with time-outs.

    receiver -> sender  BANNER
    sender -> receiver  the image
    receiver -> sender  READY
    sender -> receiver  GO
    receiver -> sender  REPORT, status byte
    receiver -> sender  PERMISSION, only behind a status that is not 0: the sender may resume

Only the banner has no NUL at its end.
"""

from __future__ import annotations

import os
import select
import time

from xsave.errors import ConnectionLost, StorageError

BANNER = b"xl migration receiver ready, send binary domain data.\n"
READY = b"domain received, ready to unpause\0"
GO = b"domain is yours, you are cleared to unpause\0"
REPORT = b"my copy unpause results are as follows\0"
PERMISSION = GO
STATUS_OK = b"\0"
#: (char)(-ERROR_FAIL), what xl sends when rename or unpause failed.
STATUS_FAIL = b"\x03"

MAX_LINE = 4096


def send(fd: int, message: bytes, what: str) -> None:
    """Write a whole message. Raises ConnectionLost."""
    view = memoryview(message)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as e:
        raise ConnectionLost(f"cannot send {what} to the other end: {e.strerror}") from e


def expect(fd: int, message: bytes, what: str, timeout_s: float) -> None:
    """Read a message that must be this one. Raises ConnectionLost, StorageError."""
    found = receive(fd, len(message), what, timeout_s)
    if found != message:
        raise StorageError(f"the other end: expected {what} ({message!r}), found {found!r}")


def receive_line(fd: int, what: str, timeout_s: float) -> bytes:
    """Read up to a newline, which is part of it, at most MAX_LINE bytes. Raises ConnectionLost."""
    deadline = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_LINE:
        line += receive(fd, 1, what, max(deadline - time.monotonic(), 0.001))
    return line


def receive(fd: int, nr: int, what: str, timeout_s: float) -> bytes:
    """Read nr bytes within the time. Raises ConnectionLost."""
    deadline = time.monotonic() + timeout_s
    data = b""
    while len(data) < nr:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise ConnectionLost(f"no {what} from the other end within {timeout_s:g} s")
        try:
            piece = os.read(fd, nr - len(data))
        except OSError as e:
            raise ConnectionLost(f"no {what} from the other end: {e.strerror}") from e
        if not piece:
            raise ConnectionLost(f"the other end closed the connection before {what}")
        data += piece
    return data
