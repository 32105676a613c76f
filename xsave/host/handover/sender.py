"""The sender's end of a hand-over: the rows of SENDER, on the wire and on the domain."""

from __future__ import annotations

import time
from collections.abc import Collection

from xsave.guest.xen.domctl import Domctl
from xsave.host import handshake
from xsave.host.handover.journal import Journal
from xsave.host.handover.play import play
from xsave.host.handover.table import SENDER, Message, Step
from xsave.host.transport import Channel

#: From the last byte of the image to the receiver's READY: page tables, vCPUs.
READY_TIMEOUT_S = 120.0
REPORT_TIMEOUT_S = 60.0


class HandingOver:
    """One hand-over. status: the byte that the receiver reported; reported_ns: when
    (CLOCK_MONOTONIC)."""

    def __init__(self, domctl: Domctl, journal: Journal, channel: Channel, output: int) -> None:
        self._domctl = domctl
        self._journal = journal
        self._channel = channel
        self._output = output
        self.status = handshake.STATUS_OK
        self.reported_ns = 0

    def run(self) -> tuple[str, BaseException | None]:
        """Return how it ended (SENDER_ENDS) and what went wrong first."""
        return play(SENDER, "sent", self)

    def send(self, message: Message) -> None:
        self._channel.send(handshake.GO, "the go-ahead")

    def receive(self, among: Collection[Message]) -> Message:
        output = self._output
        if Message.READY in among:
            handshake.expect(output, handshake.READY, "ready", READY_TIMEOUT_S)
            return Message.READY
        if Message.PERMISSION in among:
            handshake.expect(output, handshake.PERMISSION, "its permission", REPORT_TIMEOUT_S)
            return Message.PERMISSION
        handshake.expect(output, handshake.REPORT, "its report", REPORT_TIMEOUT_S)
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
