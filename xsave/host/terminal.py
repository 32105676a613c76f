"""A two-way byte stream between a guest's console and our stdin and stdout.

On a terminal the line discipline is switched off, so that every key goes to the guest, Ctrl-C
included; Ctrl-] leaves, as with `xl console`. The terminal is put back whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import termios
import time
import tty
from collections.abc import Iterator

from xsave.errors import StorageError

ESCAPE = b"\x1d"  # Ctrl-]
LEFT, STDIN_CLOSED, DOMAIN_ENDED = "left", "stdin closed", "the domain ended"
_CHUNK = 1 << 16
#: How long output that answers the last input may take to arrive.
_LINGER_S = 0.2


def relay(guest: socket.socket, stdin: int, stdout: int) -> str:
    """Carry bytes both ways until one end closes or Ctrl-] is typed; return which it was.

    Raises StorageError if stdout cannot be written, BrokenPipeError if its reader left."""
    with _raw_terminal(stdin) as interactive:
        while True:
            ready = select.select([guest.fileno(), stdin], [], [])[0]
            if guest.fileno() in ready and not _copy_output(guest, stdout):
                return DOMAIN_ENDED
            if stdin in ready:
                typed = os.read(stdin, _CHUNK)
                leave = interactive and ESCAPE in typed
                if not _type(guest, typed.partition(ESCAPE)[0] if leave else typed):
                    return DOMAIN_ENDED
                if leave:
                    return LEFT
                if not typed:
                    return _linger(guest, stdout)


def _linger(guest: socket.socket, stdout: int) -> str:
    """Let output that is on its way arrive, for at most _LINGER_S."""
    end = time.monotonic() + _LINGER_S
    while select.select([guest], [], [], max(end - time.monotonic(), 0))[0]:
        if not _copy_output(guest, stdout):
            return DOMAIN_ENDED
        if time.monotonic() >= end:
            break
    return STDIN_CLOSED


def _copy_output(guest: socket.socket, stdout: int) -> bool:
    """Copy what the guest printed; False when its end is closed."""
    try:
        data = guest.recv(_CHUNK)
    except OSError:
        return False
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(stdout, view) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write the console's output: {error.strerror}") from error
    return bool(data)


def _type(guest: socket.socket, data: bytes) -> bool:
    """Give the guest what was typed; False when its end is closed."""
    try:
        guest.sendall(data)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _raw_terminal(stdin: int) -> Iterator[bool]:
    """Switch a terminal to raw for the block; False if stdin is none."""
    if not os.isatty(stdin):
        yield False
        return
    before = termios.tcgetattr(stdin)
    try:
        tty.setraw(stdin)
        yield True
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
