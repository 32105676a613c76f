"""Addresses of raw sockets, for links that are trusted: tcp:HOST:PORT and unix:PATH."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from xsave.errors import ConnectionLost, StorageError, UsageError

_TCP = re.compile(r"tcp:(?:\[([^]]+)\]|([^:\[\]]+)):(\d{1,5})\Z")
_CONNECT_TIMEOUT_S = 30.0
#: A link that is cut is noticed after so many seconds of silence, and as many questions, by TCP.
_IDLE_S, _INTERVAL_S, _NR_PROBES = 15, 5, 3
_GOODBYE_S = 3.0
PREFIXES = ("tcp:", "unix:")


@dataclass(frozen=True)
class Address:
    """Where a socket is: a path, or a host (a name, an address) and a port."""

    text: str
    path: str | None = None
    host: str = ""
    port: int = 0

    @staticmethod
    def parse(text: str) -> Address:
        """Raises UsageError."""
        if text.startswith("unix:") and (path := text.removeprefix("unix:")) and "\0" not in path:
            return Address(text, path=str(Path(path).absolute()))
        match = _TCP.match(text)
        if not match or int(match[3]) > 0xFFFF:
            raise UsageError(f"{text!r}: expected tcp:HOST:PORT or unix:PATH ([HOST] for IPv6)")
        return Address(text, host=match[1] or match[2], port=int(match[3]))

    def connect(self) -> socket.socket:
        """Raises ConnectionLost."""
        try:
            if self.path is None:
                sock = socket.create_connection((self.host, self.port), _CONNECT_TIMEOUT_S)
            else:
                sock = socket.socket(socket.AF_UNIX)
                with _short(self.path) as path:
                    sock.connect(path)
        except (OSError, UnicodeError) as e:
            reason = getattr(e, "strerror", None) or e
            raise ConnectionLost(f"cannot connect to {self.text}: {reason}") from e
        return _prepared(sock)


class Listener:
    """A socket that waits for a sender. A unix one has mode 0600, and is gone in the end."""

    def __init__(self, address: Address) -> None:
        """Raises StorageError."""
        self._path = address.path
        try:
            if address.path is None:
                self._sock = _listen_tcp(address)
                host, port = self._sock.getsockname()[:2]
                self.text = f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
            else:
                self._sock = _listen_unix(address.path)
                self.text = address.text
        except (OSError, UnicodeError) as e:
            reason = getattr(e, "strerror", None) or e
            raise StorageError(f"cannot listen on {address.text}: {reason}") from e

    def accept(self, timeout_s: float | None = None) -> socket.socket:
        """Wait for the next one who connects. Raises ConnectionLost after a time."""
        self._sock.settimeout(timeout_s)
        try:
            return _prepared(self._sock.accept()[0])
        except TimeoutError:
            raise ConnectionLost(f"nobody has connected for {timeout_s:g} s") from None

    def close(self) -> None:
        """Listen no more."""
        if self._sock.fileno() >= 0 and self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)  # noqa: PTH108 - the path is a string here
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def say_goodbye(sock: socket.socket, line: str) -> None:
    """Send a last line, behind an empty one that begins no message. See to it that it arrives: a
    socket that is closed while something is unread resets the connection. The other end may be
    gone already."""
    deadline = time.monotonic() + _GOODBYE_S
    with contextlib.suppress(OSError):
        sock.settimeout(_GOODBYE_S)
        sock.sendall(b"\n" + line.replace("\n", " ").encode() + b"\n")
        sock.shutdown(socket.SHUT_WR)
        while time.monotonic() < deadline and sock.recv(1 << 20):
            pass


def _listen_tcp(address: Address) -> socket.socket:
    family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((address.host, address.port), family=family)


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        with _short(path) as short:
            sock.bind(short)
        sock.listen()
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


@contextlib.contextmanager
def _short(path: str) -> Iterator[str]:
    """Give a name of any path that fits into a socket address (sun_path holds 108 bytes)."""
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def _prepared(sock: socket.socket) -> socket.socket:
    """Have small messages leave at once, and a dead link noticed."""
    sock.settimeout(None)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _NR_PROBES)
    return sock
