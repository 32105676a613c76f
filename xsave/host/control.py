"""The control thread of a domain process: its socket, its connections, its console clients.

The vCPU thread owns all domain state. This thread only moves bytes: it reads requests and queues
them, notices that a connection ended, and carries console traffic. `wake()` gets the vCPU thread
out of its wait; a guest that runs on without ever crossing into the hypervisor is stopped by the
ticker (at a block boundary) once a request or a timer has waited for `grace_s`.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from xsave.errors import ConnectionLost
from xsave.guest.xen.wire import receive_message

_TICK_S = 0.002
_CONSOLE_CHUNK = 4096
_REQUEST_TIMEOUT_S = 30.0


@dataclass(eq=False)
class Client:
    """One connection. `console` is set once it became a raw console stream; `typing` a moment
    before, while its owner may not have heard of that yet: what comes in is console input then.
    full: the guest does not read what was typed, so that nothing more is taken."""

    sock: socket.socket
    console: bool = False
    typing: bool = False
    full: bool = False
    outbox: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class Request:
    """A message from a client; op "closed" when its connection ended."""

    client: Client
    op: str
    arguments: dict[str, Any]
    blob: bytes = b""


class Control:
    """Runs `serve` in a thread; the vCPU thread takes requests with `next_request`."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        #: Takes console input; False if no more may come until resume_input().
        self.on_input: Callable[[bytes], bool] = lambda data: True
        self._selector = selectors.DefaultSelector()
        self._requests: deque[Request] = deque()
        self._clients: list[Client] = []
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._own_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._outbox: deque[bytes] = deque()
        self._room = False

    def start(self) -> None:
        threading.Thread(target=self._serve, name="control", daemon=True).start()

    # -- for the vCPU thread ---

    def has_requests(self) -> bool:
        return bool(self._requests)

    def next_request(self) -> Request | None:
        return self._requests.popleft() if self._requests else None

    def put_back(self, requests: list[Request]) -> None:
        """Requests that must wait until the guest stands still."""
        self._requests.extendleft(reversed(requests))

    def wake(self) -> None:
        os.eventfd_write(self.wake_fd, 1)

    def clear_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)

    def console_output(self, data: bytes) -> None:
        """Guest output, for every attached console. Where there is none, the thread is not woken:
        a kernel that boots says a thousand things, 16 bytes at a time."""
        if any(client.console for client in list(self._clients)):
            self._outbox.append(data)
            os.eventfd_write(self._own_fd, 1)

    def resume_input(self) -> None:
        """The guest has read: take console input again."""
        self._room = True
        os.eventfd_write(self._own_fd, 1)

    def drain(self, seconds: float) -> None:
        """Wait, so long at most, until attached consoles have heard all: the end is near."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self._outbox and not any(c.outbox for c in list(self._clients)):
                return
            time.sleep(_TICK_S)

    # -- the thread ---

    def _serve(self) -> None:
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._own_fd, selectors.EVENT_READ, None)
        while True:
            for key, events in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj == self._own_fd:
                    self._distribute()
                else:
                    self._serve_client(key.data, events)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            sock.settimeout(_REQUEST_TIMEOUT_S)
            client = Client(sock)
            self._clients.append(client)
            self._selector.register(sock, selectors.EVENT_READ, client)

    def _serve_client(self, client: Client, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(client)
        if not events & selectors.EVENT_READ:
            return
        if client.typing:
            self._read_console(client)
            return
        try:
            message, blob = receive_message(client.sock)
            request = Request(client, str(message.pop("op", "")), message, blob)
        except (ConnectionLost, ValueError, TypeError, AttributeError):
            self._drop(client)
            return
        self._requests.append(request)
        self.wake()

    def _drop(self, client: Client) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.sock)
        with contextlib.suppress(ValueError):
            self._clients.remove(client)
        client.sock.close()
        self._requests.append(Request(client, "closed", {}))
        self.wake()

    # -- console ---

    def _read_console(self, client: Client) -> None:
        try:
            data = client.sock.recv(_CONSOLE_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            client.full = not self.on_input(data)
            self._watch(client)
            self.wake()
        else:
            self._drop(client)

    def _distribute(self) -> None:
        os.eventfd_read(self._own_fd)
        if self._room:
            self._room = False
            for client in [c for c in self._clients if c.full]:
                client.full = False
                self._watch(client)
        while self._outbox:
            data = self._outbox[0]
            for client in [c for c in self._clients if c.console]:
                client.outbox += data[: (1 << 20) - len(client.outbox)]
                self._flush(client)
            self._outbox.popleft()  # not before the clients have it: see drain()

    def _flush(self, client: Client) -> None:
        try:
            while client.outbox:
                del client.outbox[: client.sock.send(client.outbox)]
        except BlockingIOError:
            pass
        except OSError:  # who typed something and went is heard all the same, up to the end
            client.console = False
            client.outbox.clear()
        self._watch(client)

    def _watch(self, client: Client) -> None:
        """Listen to a connection, unless it is full, and write to it if there is something."""
        events = 0 if client.full else selectors.EVENT_READ
        events |= selectors.EVENT_WRITE if client.outbox else 0
        with contextlib.suppress(KeyError):
            self._selector.unregister(client.sock)
        if events:
            self._selector.register(client.sock, events, client)


class Ticker:
    """Gets the vCPU thread out of a busy guest when something waits for it.

    `crossings()` counts; `wanted()` says whether the vCPU thread itself is wanted, `kick()` then
    ends the run at the guest's next crossing; `due()` says whether even a guest that does not
    cross must be interrupted, `stop()` does that.
    """

    def __init__(
        self,
        grace_s: float,
        *,
        crossings: Callable[[], int],
        wanted: Callable[[], bool],
        kick: Callable[[], None],
        due: Callable[[], bool],
        stop: Callable[[], None],
    ) -> None:
        self._grace_s = grace_s
        self._crossings, self._wanted, self._kick = crossings, wanted, kick
        self._due, self._stop = due, stop
        self.running = threading.Event()
        self._lock = threading.Lock()
        self._seen, self._since = -1, 0.0

    def rest(self) -> None:
        """The guest does not run any more: when this returns, nobody looks at it or stops it."""
        with self._lock:
            self.running.clear()

    def start(self) -> None:
        threading.Thread(target=self._serve, name="ticker", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self.running.wait()
            time.sleep(_TICK_S)
            with self._lock:
                if self.running.is_set():
                    self._tick()

    def _tick(self) -> None:
        if self._wanted():
            self._kick()
        crossings = self._crossings()
        if crossings != self._seen or not self._due():
            self._seen, self._since = crossings, time.monotonic()
        elif time.monotonic() - self._since >= self._grace_s:
            self._stop()
