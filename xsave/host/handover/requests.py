"""What the control socket asks of a domain that is one of a migration's two copies, or of any that
is to be suspended, resumed or ended: nothing of it happens before the journal has it.
"""

from __future__ import annotations

import contextlib
from typing import Any

from xsave.errors import GuestStateError, StorageError, SuspendFailed, XsaveError
from xsave.host.building import Building
from xsave.host.control import Client, Request
from xsave.host.handover.copy import Copy
from xsave.host.running import RunningDomain
from xsave.host.suspension import Suspension

_INCOMING = "the domain is on its way in, see `xsave migrate --status`"

Answer = tuple[dict[str, Any], bytes]


class HandoverRequests:
    """The requests of one domain process that need its journal."""

    def __init__(self, running: RunningDomain, building: Building, suspension: Suspension) -> None:
        self._running = running
        self._building = building
        self._suspension = suspension
        self._copy = Copy()

    @property
    def whole(self) -> bool:
        """True once the domain survives the connection that makes it."""
        return self._building.committed and not self._copy.incoming

    @property
    def waits(self) -> bool:
        """True if it is a migration's copy, complete, and may not run yet."""
        return self._building.committed and self._copy.incoming

    def lost_builder(self) -> None:
        """Nobody makes the domain any more, and it is not whole."""
        self._copy.abandon_quietly()
        self._running.finished = True

    def ended(self) -> None:
        """The process has left its loop."""
        self.see_to_memory()
        self._copy.end()

    def op_begin(self, request: Request) -> Answer:
        """As always; a migration's copy has a journal."""
        answer = self._building.op_begin(request)
        self._copy.receive(request.arguments.get("journal"))
        return answer

    def op_suspend(self, request: Request) -> Answer | None:
        if self._copy.incoming:
            raise SuspendFailed(_INCOMING, stage="request")
        if self._running.filling.lost:
            raise SuspendFailed("the domain has crashed: its memory was lost", stage="request")
        self._running.throttle.percent = 0  # a guest that freezes itself is to be done soon
        at_once = self._suspension.request(
            request.client, paused=self._running.paused, restored=self._building.restored
        )
        return ({}, b"") if at_once else None

    def op_hold(self, request: Request) -> Answer:
        """The other end may have the disks from here on."""
        self._suspension.check_suspended()
        try:
            self._running.disks.close()
            self._copy.hold(request.arguments.get("journal"))
        except XsaveError:
            if not self._has_disks():
                self._suspension.hold()  # it cannot go on without them by itself
            raise
        self._suspension.hold()
        return {}, b""

    def op_held(self, request: Request) -> Answer:
        """Who sends frames of a guest that is suspended asks after having read them."""
        if self._running.finished or not self._copy.is_held_by(request.arguments.get("journal")):
            raise GuestStateError("this migration does not hold the domain any more")
        return {}, b""

    def _has_disks(self) -> bool:
        with contextlib.suppress(StorageError):
            self._running.disks.open()
            return True
        return False

    def op_resume(self, request: Request) -> Answer:
        journal = request.arguments.get("journal")
        if self._copy.is_held_by_another(journal):
            raise GuestStateError("another migration of this domain is undecided")
        if not self._copy.is_held_by(journal):
            self._suspension.check_holder(request.client)
        self.wake()
        self._running.paused = self._running.paused or bool(request.arguments.get("paused"))
        return {}, b""

    def wake(self) -> None:
        """A guest that is suspended goes on, if it can have its disks and nobody else has it."""
        self._running.disks.open()
        try:
            self._copy.take_back()
        except XsaveError:
            self._running.disks.close_quietly()
            raise
        self._suspension.resume()

    def start(self, client: Client) -> None:
        """The domain is about to run, perhaps for the first time."""
        if self._copy.incoming and client is not self._building.builder:
            raise GuestStateError(_INCOMING)
        self._running.disks.open()
        filling = self._running.filling
        early = self._copy.incoming and filling.from_source and filling.started
        self._copy.take_over(early=early)
        if early:
            filling.go()  # whatever is done to it now may want pages
        self.wake()

    def see_to_memory(self) -> None:
        """Write down how it ended with the pages that came from the source, once it has."""
        filling = self._running.filling
        if not self._copy.partial or filling.active:
            return
        with contextlib.suppress(XsaveError):  # when there is room again
            if filling.lost:
                self._copy.lose()
            else:
                self._copy.complete()

    def op_filled(self, _request: Request) -> Answer:
        """Asked when no page comes any more: all of them are there."""
        if self._running.filling.lost:
            raise StorageError(f"the guest's memory was lost: {self._running.filling.lost}")
        self._copy.complete()
        return {}, b""

    def op_abandon(self, request: Request) -> Answer:
        """Who makes the domain gives it up, or whoever asks for the copy of a migration. Raises
        GuestStateError if that runs."""
        mine = self._building.builder in (None, request.client)
        if not mine and not self._copy.is_made_by(request.arguments.get("journal")):
            raise GuestStateError("the domain is no copy of this migration")
        self._copy.abandon()
        return self._finish()

    def op_destroy(self, request: Request) -> Answer:
        journal = request.arguments.get("journal")
        if journal is not None and not self._copy.is_held_by(journal):
            raise GuestStateError("this migration does not hold the domain")
        if self._copy.incoming:
            self._copy.abandon()
        self._copy.give_up()
        return self._finish()

    def _finish(self) -> Answer:
        self._running.finished = True
        self._running.disks.close_quietly()  # who asks may want them at once
        with contextlib.suppress(OSError):
            (self._running.directory / "dying").touch()
        return {}, b""
