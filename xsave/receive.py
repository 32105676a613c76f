"""migrate-receive: the far end of a migration. It restores the image, and runs it once the sender
has let go of the guest.

The conversation is xl's (host/handshake.py), so that a real `xl migrate` may be the sender; which
of the two copies is the guest, the journals say (host/handover). While the copy is not the guest
it belongs to the connection of this process: if that dies the copy goes, too.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xsave.errors import ConnectionLost, XsaveError
from xsave.guest.xen.domctl import DomainInfo, Domctl
from xsave.host import handshake
from xsave.host.channel import open_joined, open_source
from xsave.host.handover.journal import Journal, Journals, new_transaction
from xsave.host.handover.play import play
from xsave.host.handover.table import RECEIVER, RECEIVER_POSTCOPY, TARGET, Message, Step
from xsave.postponed import Postponed
from xsave.progress import Report, ignore
from xsave.restore import MakeDomain, restore

if TYPE_CHECKING:
    from xsave.host.source import Source

INCOMING_SUFFIX = "--incoming"
#: A link that is cut says nothing. Longer than a guest may take to suspend.
SILENCE_TIMEOUT_S = 600.0
#: From READY to the go-ahead: until then the sender has its guest's disks written.
GO_TIMEOUT_S = 300.0
_MESSAGES = {
    Message.READY: (handshake.READY, "ready"),
    Message.STARTED: (handshake.REPORT + handshake.STATUS_OK, "the report"),
    Message.FAILED: (handshake.REPORT + handshake.STATUS_FAIL, "the report"),
    Message.PERMISSION: (handshake.PERMISSION, "the permission"),
    Message.COMPLETED: (handshake.COMPLETED, "that all has come"),
}


@dataclass(frozen=True)
class Received:
    """What runs now; the guest's wall clock when it began to (0: nobody knows); which migration."""

    info: DomainInfo
    resumed_ns: int
    transaction: str


def receive(
    make_domain: MakeDomain,
    channel: str | Sequence[int],
    output: int,
    journals: Journals,
    *,
    transaction: str | None = None,
    nr_frames: int,
    cpu_mismatch: str = "refuse",
    postponed: Postponed | None = None,
    report: Report = ignore,
) -> Received:
    """Take an image from `channel` ("-": stdin; or the descriptors of several connections), start
    its guest at the sender's GO.

    Messages go to the descriptor `output`. transaction: the sender's, one of our own if it has
    none (xl). postponed, of this very connection: the guest may run before all of its memory is
    here, make_domain gives the domain its descriptors; this returns when all has come.

    Raises what restore raises, and ConnectionLost without a go-ahead; nothing is left here then.
    StorageError if the guest runs and the rest of its memory never comes.
    """
    transaction = transaction or new_transaction()
    with journals.begin(TARGET, transaction, "") as journal:
        try:
            handshake.send(output, handshake.BANNER, "the banner")  # the sender waits for it
            opened = (
                open_source(channel, SILENCE_TIMEOUT_S)
                if isinstance(channel, str)
                else open_joined(channel, SILENCE_TIMEOUT_S)
            )
            with opened as source:
                taking = _Taking(make_domain, source, output, journal, postponed)
                info = restore(
                    source,
                    taking.make,
                    suffix=INCOMING_SUFFIX,
                    cpu_mismatch=cpu_mismatch,
                    nr_frames=nr_frames,
                    until_end=False,
                    postponed=postponed,
                    start=taking.hand_over,
                    report=report,
                )
        except BaseException:
            with suppress(XsaveError):  # it has been, or it runs, or there is no room to say so
                journal.take(Step.ABANDON)
            raise
    return Received(info, taking.resumed_ns, transaction)


class _Taking:
    """The receiver's end of a hand-over: the rows of RECEIVER."""

    def __init__(
        self,
        make_domain: MakeDomain,
        source: Source,
        output: int,
        journal: Journal,
        postponed: Postponed | None,
    ) -> None:
        self._make_domain = make_domain
        self._source = source
        self._output = output
        self._journal = journal
        self._postponed = postponed
        self._domctl: Domctl | None = None
        self._info: DomainInfo | None = None
        self._lost: XsaveError | None = None

    @property
    def resumed_ns(self) -> int:
        return self._domctl.resumed_ns if self._domctl else 0

    def make(self, name: str, nr_pages: int) -> Domctl:
        """Make the domain, one that knows its journal."""
        domctl = self._make_domain(name, nr_pages)
        try:
            self._journal.note(name=name.removesuffix(INCOMING_SUFFIX), domid=domctl.domid)
        except BaseException:
            domctl.close()
            raise
        domctl.journal = str(self._journal.path)
        return domctl

    def hand_over(self, domctl: Domctl) -> DomainInfo:
        """Offer the complete copy, and run it if it becomes the guest."""
        self._domctl = domctl
        early = self._postponed is not None and self._postponed.begun
        end, wrong = play(RECEIVER_POSTCOPY if early else RECEIVER, "complete", self)
        if self._lost:
            raise self._lost
        if end == "taken" and self._info is not None:
            return self._info
        raise wrong or ConnectionLost("the copy was given up")

    def send(self, message: Message) -> None:
        handshake.send(self._output, *_MESSAGES[message])

    def receive(self, among: Collection[Message]) -> Message:
        self._wait()
        go = bytes(self._source.read(len(handshake.GO)))
        if go != handshake.GO:
            raise ConnectionLost(f"expected the go-ahead, found {go!r}")
        return Message.GO

    def _wait(self) -> None:
        deadline = time.monotonic() + GO_TIMEOUT_S
        while not self._source.ready(1.0):
            if time.monotonic() > deadline:
                raise ConnectionLost(f"no go-ahead from the sender within {GO_TIMEOUT_S:g} s")

    def do(self, step: Step) -> None:
        domctl = self._domctl
        assert domctl is not None
        if step == Step.OFFER:
            self._journal.take(step)
        elif step in (Step.TAKE_OVER, Step.TAKE_OVER_EARLY):
            self._info = domctl.take_over(domctl.name.removesuffix(INCOMING_SUFFIX))
        elif step == Step.COMPLETE:
            try:
                domctl.wait_filled()
            except XsaveError as e:
                self._lost = e
                raise
        else:
            self._abandon(domctl)

    def _abandon(self, domctl: Domctl) -> None:
        """The sender may have its guest back, but not before this is certain."""
        with suppress(ConnectionLost):  # its process has died
            domctl.give_up_copy()
        self._journal.take(Step.ABANDON)
