"""The lease on a suspended guest: one save or migration at a time, undone if its holder dies.

    request -> acknowledge -> suspend -> done -> resume | destroy
                    |             |        '-- hold: nobody but an explicit word resumes it
                    '-- late -----'-- the request is withdrawn, the guest runs on

A guest that cannot suspend may say why (excuses.py): then nobody waits for the time-out.
The steps and their time-outs are libxl's (domain_suspend_callback_common). A domain that was
restored paused and has never run is suspended as it is: there is no kernel to ask.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from xsave.errors import ConnectionLost, GuestStateError, StorageError, SuspendFailed
from xsave.guest.xen.domain import Domain
from xsave.guest.xen.wire import error_message, send_message
from xsave.host.control import Client
from xsave.host.excuses import Excuses
from xsave.host.running import RunningDomain
from xsave.public import SHUTDOWN_NAMES, SHUTDOWN_SUSPEND

#: How long the guest may take to acknowledge, and then to suspend (libxl: 60 s each).
SUSPEND_TIMEOUT_S = float(os.environ.get("XSAVE_SUSPEND_TIMEOUT") or 60)


class Suspension:
    """Who asked the guest to suspend, and how far it is."""

    def __init__(self, running: RunningDomain, released: Callable[[], None]) -> None:
        """released() is called when the lease ends without an answer of its holder."""
        self._running = running
        self._released = released
        self._holder: Client | None = None
        self._stage = ""
        self._deadline: float | None = None
        self._excuses: Excuses | None = None
        self._suspended_ns: int | None = None
        self.held = False

    @property
    def active(self) -> bool:
        """True while a connection holds the lease."""
        return self._holder is not None

    def keeps_waiting(self, client: Client) -> bool:
        """True while the answer to this client's request is still to come."""
        return client is self._holder and self._stage != "done"

    @property
    def _domain(self) -> Domain:
        return self._running.domain

    @property
    def _node(self) -> str:
        return f"{self._domain.home}/control/shutdown"

    def deadline_s(self) -> float | None:
        """Seconds until the request is given up, None if none waits."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def request(self, client: Client, *, paused: bool, restored: bool) -> bool:
        """Ask the guest. True if it counts as suspended at once. Raises SuspendFailed."""
        domain = self._domain
        if self._holder is not None:
            raise SuspendFailed("another save or migration of this domain is at work", stage="lock")
        if self.held:
            raise SuspendFailed("a migration of this domain is undecided", stage="lock")
        if domain.never_run and restored and paused:  # no kernel to ask, none will come
            self._holder, self._stage = client, "done"
            return True
        self._refuse(domain, paused)
        self._holder, self._stage, self._suspended_ns = client, "acknowledge", None
        self._deadline = self._timeout()
        self._excuses = Excuses(domain)
        domain.clock.extend()
        domain.store.write(self._node, "suspend")
        domain.serve_store()
        return False

    def _timeout(self) -> float | None:
        """A deterministic guest has until it holds, however busy this host is: a request that is
        withdrawn is something that the guest sees."""
        virtual = self._domain.clock.virtual
        return None if virtual else time.monotonic() + SUSPEND_TIMEOUT_S

    def _refuse(self, domain: Domain, paused: bool) -> None:
        if domain.shutdown_reason is not None:
            what = SHUTDOWN_NAMES[domain.shutdown_reason]
            raise SuspendFailed(f"the domain has shut down ({what})", stage="request")
        if paused:
            raise SuspendFailed(
                "the domain is paused, so its kernel cannot suspend: unpause it first",
                stage="request",
            )

    def check(self) -> None:
        """Advance a request that waits: acknowledged, suspended, failed or late."""
        holder = self._holder
        if holder is None or self._stage == "done":
            return
        domain = self._domain
        reason = domain.shutdown_reason
        if reason == SHUTDOWN_SUSPEND:
            self._finish(holder)
        elif reason is not None:
            what = SHUTDOWN_NAMES[reason]
            self._fail(holder, f"the guest did not suspend but shut down ({what})")
        elif self._excuses and (why := self._excuses.written()):
            self._withdraw()
            self._fail(holder, f"the guest could not suspend: {why}")
        elif self._stage == "acknowledge" and self._acknowledged():
            self._reply(holder, {"event": "acknowledged"})
            self._stage = "suspend"
            self._deadline = self._timeout()
        elif self.deadline_s() == 0.0 or self._running.holding():
            self._late(holder)

    def _finish(self, holder: Client) -> None:
        """The guest has suspended; it counts once nothing of it is on its way to a disk."""
        self._deadline = None
        if self._suspended_ns is None:
            self._suspended_ns = self._domain.clock.wall_ns()
        try:
            if not self._running.disks.settled():
                return  # what is done then wakes us
        except StorageError as e:
            self._fail(holder, f"the guest's disks cannot be written: {e}")
            return
        self._reply(holder, {"suspended_ns": self._suspended_ns})
        self._stage = "done"
        self._listen_no_more()

    def _acknowledged(self) -> bool:
        return self._domain.store.read(self._node) != b"suspend"

    def _withdraw(self) -> None:
        if not self._acknowledged():
            self._domain.store.write(self._node, "")

    def _late(self, holder: Client) -> None:
        if self._stage == "acknowledge":
            self._withdraw()
            self._fail(holder, "the guest did not acknowledge the request to suspend in time")
        else:
            message = "the guest acknowledged the request but did not suspend in time"
            why = self._excuses.printed() if self._excuses else ""
            self._fail(holder, f"{message}: its console says: {why}" if why else message)

    def _listen_no_more(self) -> None:
        if self._excuses:
            self._excuses.close()
            self._excuses = None

    def _fail(self, holder: Client, message: str) -> None:
        self._holder, self._deadline = None, None
        self._listen_no_more()
        self._reply(holder, error_message(SuspendFailed(message, stage=self._stage)))
        self._released()

    def _reply(self, client: Client, message: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionLost):
            send_message(client.sock, message)

    def closed(self, client: Client) -> None:
        """A connection ended. If it held the lease: withdraw the request, or resume the guest."""
        if client is not self._holder:
            return
        self._holder, self._deadline = None, None
        self._listen_no_more()
        if self._domain.shutdown_reason is not None:
            self._released()
        elif not self._domain.never_run:
            self._withdraw()

    def check_suspended(self) -> None:
        """Raise GuestStateError if nobody holds the lease on a suspended guest."""
        if self._holder is None or self._stage != "done":
            raise GuestStateError("the guest is not suspended")

    def hold(self) -> None:
        """From here on the guest stays as it is when the holder dies."""
        self.held = True

    def check_holder(self, client: Client) -> None:
        """Raise GuestStateError if the lease is somebody else's."""
        if self.active and client is not self._holder:
            raise GuestStateError("another save or migration of this domain is at work")

    def resume(self) -> None:
        """End the lease. XEN_DOMCTL_resumedomain after a fast suspend: the hypercall returns 1."""
        self._holder, self._deadline, self.held = None, None, False
        self._listen_no_more()
        domain = self._domain
        if domain.shutdown_reason == SHUTDOWN_SUSPEND:
            self._running.xen.set_result(1)
            domain.shutdown_reason = None
            domain.clock.extend()
