"""The sender's end of a hand-over: its rows, on the wire and on the domain.

With post-copy (SENDER_POSTCOPY) pages are asked for from the go-ahead on, before the report even,
and sent between two messages.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np

from xsave.errors import ConnectionLost, StorageError
from xsave.guest.xen.domctl import Domctl
from xsave.host import handshake
from xsave.host.handover.journal import Journal
from xsave.host.handover.play import play
from xsave.host.handover.table import SENDER, SENDER_LIVE, SENDER_POSTCOPY, Message, Step
from xsave.host.transport import Channel
from xsave.image import postwire

#: From the last byte of the image to the receiver's READY: page tables, vCPUs.
READY_TIMEOUT_S = 120.0
REPORT_TIMEOUT_S = 60.0


class LeftOut(Protocol):
    """The pages that are sent behind the guest (xsave.postcopy)."""

    def send_wanted(self, pfns: np.ndarray) -> None: ...
    def send_more(self) -> bool: ...
    def send_end(self) -> None: ...


class HandingOver:
    """One hand-over. status: the byte that the receiver reported; reported_ns: when
    (CLOCK_MONOTONIC)."""

    def __init__(
        self,
        domctl: Domctl,
        journal: Journal,
        channel: Channel,
        output: int,
        left_out: LeftOut | None = None,
        before_go: Callable[[], None] = lambda: None,
        *,
        soon: bool = False,
    ) -> None:
        """left_out: with post-copy, what of the guest's memory is not in the image. before_go() is
        called just before the go-ahead. soon: READY is a moment away, and the target an xsave."""
        self._domctl = domctl
        self._journal = journal
        self._channel = channel
        self._output = output
        self._left_out = left_out
        self._before_go = before_go
        self._soon = soon
        self.status = handshake.STATUS_OK
        self.reported_ns = 0

    def run(self) -> tuple[str, BaseException | None]:
        """Return how it ended (SENDER_ENDS) and what went wrong first."""
        rows = SENDER_LIVE if self._soon else SENDER
        return play(rows if self._left_out is None else SENDER_POSTCOPY, "sent", self)

    def send(self, message: Message) -> None:
        if message == Message.PAGES:
            self._send_left_out()
        else:
            self._before_go()
            self._channel.send(handshake.GO, "the go-ahead")

    def receive(self, among: Collection[Message]) -> Message:
        output = self._output
        if Message.READY in among:
            handshake.expect(output, handshake.READY, "ready", READY_TIMEOUT_S)
            return Message.READY
        if Message.PERMISSION in among:
            handshake.expect(output, handshake.PERMISSION, "its permission", REPORT_TIMEOUT_S)
            return Message.PERMISSION
        if Message.COMPLETED in among:
            self._serve_until(handshake.COMPLETED, "that all has come")
            return Message.COMPLETED
        if self._serve_until(handshake.REPORT, "its report"):
            self.status = handshake.receive(output, 1, "its status", REPORT_TIMEOUT_S)
        self.reported_ns = time.monotonic_ns()
        return Message.STARTED if self.status == handshake.STATUS_OK else Message.FAILED

    def do(self, step: Step) -> None:
        if step == Step.HOLD:
            self._domctl.hold()
        elif step == Step.GIVE_UP:
            self._domctl.destroy()
        else:
            self._domctl.resume()
            self._journal.take(step)

    # -- post-copy ---

    def _serve_until(self, message: bytes, what: str) -> bool:
        """Read a message, and send the pages that are asked for in front of it. False if the
        process that fetches them has said first that the guest is the target's."""
        if self._left_out is None:
            handshake.expect(self._output, message, what, REPORT_TIMEOUT_S)
            return True
        size = postwire.HEADER.size
        while (header := self._header(what)) != message[:size]:
            if header == postwire.begin() and message == handshake.REPORT:
                return False
            self._answer(header)
        handshake.expect(self._output, message[size:], what, REPORT_TIMEOUT_S)
        return True

    def _header(self, what: str) -> bytes:
        return handshake.receive(self._output, postwire.HEADER.size, what, REPORT_TIMEOUT_S)

    def _answer(self, header: bytes) -> None:
        """Do what a record asks for; of the report and POSTCOPY_BEGIN the later one says nothing
        new."""
        assert self._left_out is not None
        if header == postwire.begin():
            return
        if header == handshake.REPORT[: len(header)]:
            rest = handshake.REPORT[len(header) :] + handshake.STATUS_OK
            handshake.expect(self._output, rest, "the rest of its report", REPORT_TIMEOUT_S)
            return
        kind, length = postwire.HEADER.unpack(header)
        if kind != postwire.FAULT or length > postwire.MAX_FAULT_BODY:
            raise StorageError(f"the other end: expected a request for pages, found {header!r}")
        body = handshake.receive(self._output, length, "which pages it wants", REPORT_TIMEOUT_S)
        try:
            self._left_out.send_wanted(postwire.faulted(body))
        except ValueError as e:
            raise StorageError(f"the other end: {e}") from e

    def _send_left_out(self) -> None:
        assert self._left_out is not None
        more = True
        while more:
            while select.select([self._output], [], [], 0)[0]:
                self._answer(self._header("which pages it wants"))
            more = self._left_out.send_more()
        try:
            self._left_out.send_end()
        except StorageError as e:
            raise ConnectionLost(f"cannot send the guest's pages to the other end: {e}") from e
