"""The conversation of xl migrate, byte for byte (tools/xl/xl_migrate.c), with time-outs.

    receiver -> sender  BANNER
    sender -> receiver  the image
    receiver -> sender  READY
    sender -> receiver  GO
    receiver -> sender  REPORT, status byte
    receiver -> sender  PERMISSION, only behind a status that is not 0: the sender may resume

Only the banner has no NUL at its end. With post-copy, which xl does not know, the receiver says
COMPLETED at the very end.

At a raw socket an xsave that listens (welcome) says HELLO before all that, and takes one line of
JSON, its options: so that the sender knows it from an xl that somebody put behind a socket. What
it has to say at the end, or its complaint, comes there too, behind the last message.
"""

from __future__ import annotations

import json
import os
import select
import time

from xsave.errors import ConnectionLost, StorageError

HELLO = b"xsave migration receiver, version 1\n"
BANNER = b"xl migration receiver ready, send binary domain data.\n"
READY = b"domain received, ready to unpause\0"
GO = b"domain is yours, you are cleared to unpause\0"
REPORT = b"my copy unpause results are as follows\0"
PERMISSION = GO
STATUS_OK = b"\0"
#: Behind it with post-copy, between records of image/postwire.py: all of the memory is there.
COMPLETED = b"all of its memory has come\0"
#: (char)(-ERROR_FAIL), what xl sends when rename or unpause failed.
STATUS_FAIL = b"\x03"

MAX_LINE = 4096
_OPTIONS_TIMEOUT_S = 30.0


def send(fd: int, message: bytes, what: str) -> None:
    """Write a whole message. Raises ConnectionLost."""
    view = memoryview(message)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as e:
        raise ConnectionLost(f"cannot send {what} to the other end: {e.strerror}") from e


def expect(fd: int, message: bytes, what: str, timeout_s: float) -> None:
    """Read a message that must be this one, and not a byte behind the first that is not its: a
    complaint may follow. Raises ConnectionLost, StorageError."""
    deadline = time.monotonic() + timeout_s
    found = b""
    while len(found) < len(message):
        found += _receive_until(fd, 1, what, deadline, timeout_s)
        if not message.startswith(found):
            raise StorageError(f"the other end: expected {what} ({message!r}), found {found!r}")


def receive_line(fd: int, what: str, timeout_s: float) -> bytes:
    """Read up to a newline, which is part of it, at most MAX_LINE bytes, and nothing behind it.
    Raises ConnectionLost."""
    deadline = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_LINE:
        line += _receive_until(fd, 1, what, deadline, timeout_s)
    return line


def receive(fd: int, nr: int, what: str, timeout_s: float) -> bytes:
    """Read nr bytes within the time. Raises ConnectionLost."""
    return _receive_until(fd, nr, what, time.monotonic() + timeout_s, timeout_s)


def _receive_until(fd: int, nr: int, what: str, deadline: float, timeout_s: float) -> bytes:
    data = b""
    while len(data) < nr:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise ConnectionLost(f"the other end did not say {what} within {timeout_s:g} s")
        try:
            piece = os.read(fd, nr - len(data))
        except OSError as e:
            raise ConnectionLost(f"the other end did not say {what}: {e.strerror}") from e
        if not piece:
            raise ConnectionLost(f"the other end closed the connection before {what}")
        data += piece
    return data


def welcome(fd: int) -> dict[str, str]:
    """Say who we are at a socket; return the options that the sender answers with.

    Raises ConnectionLost, StorageError."""
    send(fd, HELLO, "the greeting")
    line = receive_line(fd, "a line of options", _OPTIONS_TIMEOUT_S)
    try:
        options = json.loads(line)
        if isinstance(options, dict) and all(isinstance(v, str) for v in options.values()):
            return options
    except ValueError:
        pass
    raise StorageError(f"the other end: expected a line of options, found {line[:100]!r}")
