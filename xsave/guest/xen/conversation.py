"""What is asked of a domain's process over a control socket, and its answers, in the same order.

Several requests may be on their way: the process has all that it needs for them, and who asked
does something else before it waits.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from xsave.guest.xen.wire import raise_error, receive_message, send_message

#: An answer's message and what came with it.
Answer = tuple[dict[str, Any], bytes]
OnEvent = Callable[[str], None]


class Pending:
    """A request that was sent and whose answer is still to come, behind those sent before."""

    def __init__(self, receive: Callable[[OnEvent | None], None]) -> None:
        self._receive = receive
        self.answer: Answer | None = None

    def wait(self, on_event: OnEvent | None = None) -> Answer:
        """Return the answer; on_event hears what comes before it. Raises what went wrong there;
        ConnectionLost."""
        while self.answer is None:
            self._receive(on_event)
        raise_error(self.answer[0])
        return self.answer


class Conversation:
    """The requests of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pending: deque[Pending] = deque()  # in the order of their answers

    def ask(self, op: str, blob: bytes, arguments: dict[str, Any]) -> Pending:
        """Send a request. Raises ConnectionLost."""
        pending = Pending(self._receive)
        self._pending.append(pending)  # first: a Ctrl-C may come behind the message
        send_message(self._sock, {"op": op, **arguments}, blob)
        return pending

    def _receive(self, on_event: OnEvent | None) -> None:
        """Read one message: an event, or the answer to what was asked first of all pending. Who
        asked may wait no more, because of a Ctrl-C; then it is nobody's."""
        message, blob = receive_message(self._sock)
        if "event" not in message:
            self._pending.popleft().answer = message, blob
        elif on_event:
            on_event(message["event"])
