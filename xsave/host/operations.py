"""What the control socket asks of a domain, done by its vCPU thread between two runs.

Three leases: a connection that builds the domain (until `commit`), one that suspended the guest
(until `resume` or `destroy`). If it is closed without a word, its holder died: a half-built
domain is removed, a suspended guest goes on as if the save had been cancelled.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xsave.errors import (
    ConnectionLost,
    GuestStateError,
    NameTaken,
    SuspendFailed,
    UsageError,
    XsaveError,
)
from xsave.guest.xen.cpuregs import RAX
from xsave.guest.xen.domain import Domain
from xsave.guest.xen.domctl import error_message, send_message
from xsave.host import host as hosts
from xsave.host.building import Building
from xsave.host.control import Client, Request
from xsave.public import SHUTDOWN_CRASH, SHUTDOWN_NAMES, SHUTDOWN_SUSPEND

if TYPE_CHECKING:
    from xsave.host.process import DomainProcess

#: How long the guest may take to acknowledge, and then to suspend (as libxl: 60 s each).
SUSPEND_TIMEOUT_S = 60.0
#: How long a fresh process waits for the command that started it to say what to build.
_BUILDER_TIMEOUT_S = 30.0
#: Requests that change what the guest does next: a deterministic guest gets them only while it
#: stands still at its horizon, so that real time cannot matter.
_AT_HORIZON = {"suspend", "shutdown"}

Answer = tuple[dict[str, Any], bytes]


class Operations:
    """The requests of one domain process."""

    def __init__(self, process: DomainProcess) -> None:
        self._process = process
        self.paused = True
        self._saver: Request | None = None
        self._suspend_stage = ""
        self._held = False
        self._deadline: float | None = time.monotonic() + _BUILDER_TIMEOUT_S
        self._building = Building(process)

    @property
    def _domain(self) -> Domain:
        if self._process.domain is None:
            raise GuestStateError("the domain is not built yet")
        return self._process.domain

    # -- the loop's side ---------------------------------------------------------------------------

    def deadline_s(self) -> float | None:
        """Seconds until a waiting suspend (or a builder) is given up, None if none waits."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def serve(self) -> None:
        """Do all that is queued."""
        later: list[Request] = []
        while request := self._process.control.next_request():
            if request.op in _AT_HORIZON and self._must_wait():
                later.append(request)
            else:
                self._serve_one(request)
        self._process.control.put_back(later)
        if self._process.domain is None and self.deadline_s() == 0.0:
            self._process.finished = True
        self._check_suspend()

    def _must_wait(self) -> bool:
        domain = self._process.domain
        return (
            domain is not None
            and domain.clock.virtual
            and not self.paused
            and domain.shutdown_reason is None
            and not self._process.holding()
        )

    def _serve_one(self, request: Request) -> None:
        if request.op == "closed":
            self._closed(request.client)
            return
        if request.op == "begin":
            self._deadline = None
        name = "op_" + request.op
        handler: Callable[[Request], Answer | None] | None = getattr(
            self, name, getattr(self._building, name, None)
        )
        try:
            if handler is None:
                raise UsageError(f"unknown request {request.op!r}")
            answer = handler(request)
        except XsaveError as e:
            answer = (error_message(e), b"")
        except (KeyError, TypeError, ValueError) as e:
            answer = (error_message(UsageError(f"malformed {request.op} request: {e}")), b"")
        if answer is not None:
            self._reply(request.client, *answer)

    def _reply(self, client: Client, message: dict[str, Any], blob: bytes = b"") -> None:
        with contextlib.suppress(ConnectionLost):
            send_message(client.sock, message, blob)

    def _closed(self, client: Client) -> None:
        building = self._building
        if not building.committed and building.builder in (None, client):
            self._process.finished = True
        if self._saver is not None and client is self._saver.client:
            self._saver = None
            self._abandon_suspend()

    def after_run(self) -> None:
        """The guest stopped running for whatever reason: did it shut down?"""
        reason = self._process.domain.shutdown_reason
        if reason is None:
            return
        if reason == SHUTDOWN_SUSPEND:
            if self._saver is None and not self._held:  # a late suspend, nobody waits any more
                self._resume_cancelled()
        elif reason != SHUTDOWN_CRASH and self._saver is None:
            self._process.finished = True  # on_poweroff and on_reboot are "destroy"

    # -- suspend ------------------------------------------------------------------------------------

    def op_suspend(self, request: Request) -> Answer | None:
        domain = self._domain
        if self._saver is not None:
            raise SuspendFailed("another save or migration of this domain is at work", stage="lock")
        if domain.never_run and self._building.restored:
            self._saver = request
            self._suspend_stage = "done"
            return {}, b""
        self._refuse_suspend(domain)
        self._saver = request
        self._suspend_stage = "acknowledge"
        self._deadline = time.monotonic() + SUSPEND_TIMEOUT_S
        if domain.clock.virtual:
            domain.clock.extend()
        domain.store.write(f"{domain.home}/control/shutdown", "suspend")
        domain.serve_store()
        return None

    def _refuse_suspend(self, domain: Domain) -> None:
        if domain.shutdown_reason is not None:
            what = SHUTDOWN_NAMES[domain.shutdown_reason]
            raise SuspendFailed(f"the domain has shut down ({what})", stage="request")
        if self.paused:
            raise SuspendFailed(
                "the domain is paused, so its kernel cannot suspend: unpause it first",
                stage="request",
            )

    def _check_suspend(self) -> None:
        """Advance a suspend that waits: acknowledged, suspended, failed or late."""
        if self._saver is None or self._suspend_stage == "done":
            return
        domain = self._process.domain
        reason = domain.shutdown_reason
        if reason == SHUTDOWN_SUSPEND:
            self._finish_suspend({})
        elif reason is not None:
            what = SHUTDOWN_NAMES[reason]
            self._fail_suspend(f"the guest did not suspend but shut down ({what})")
        elif self._suspend_stage == "acknowledge" and self._acknowledged(domain):
            self._reply(self._saver.client, {"event": "acknowledged"})
            self._suspend_stage = "suspend"
            self._deadline = time.monotonic() + SUSPEND_TIMEOUT_S
        elif self.deadline_s() == 0.0 or (domain.clock.virtual and self._process.holding()):
            self._late_suspend(domain)

    def _acknowledged(self, domain: Domain) -> bool:
        return domain.store.read(f"{domain.home}/control/shutdown") != b"suspend"

    def _late_suspend(self, domain: Domain) -> None:
        if self._suspend_stage == "acknowledge":
            domain.store.write(f"{domain.home}/control/shutdown", "")
            self._fail_suspend("the guest did not acknowledge the request to suspend in time")
        else:
            self._fail_suspend("the guest acknowledged the request but did not suspend in time")

    def _finish_suspend(self, message: dict[str, Any]) -> None:
        self._reply(self._saver.client, message)
        self._suspend_stage, self._deadline = "done", None

    def _fail_suspend(self, message: str) -> None:
        error = SuspendFailed(message, stage=self._suspend_stage)
        saver, self._saver, self._deadline = self._saver, None, None
        self._reply(saver.client, error_message(error))
        self.after_run()

    def _abandon_suspend(self) -> None:
        """Whoever asked is gone: withdraw the request, or let a suspended guest go on."""
        domain = self._process.domain
        self._deadline = None
        if domain.shutdown_reason is None:
            if not domain.never_run and not self._acknowledged(domain):
                domain.store.write(f"{domain.home}/control/shutdown", "")
        else:
            self.after_run()

    def _resume_cancelled(self) -> None:
        """XEN_DOMCTL_resumedomain after a fast suspend: the hypercall returns 1."""
        domain = self._process.domain
        if domain.shutdown_reason == SHUTDOWN_SUSPEND:
            self._process.hypervisor.cpu.q[RAX] = 1
            domain.shutdown_reason = None
            if domain.clock.virtual:
                domain.clock.extend()

    def op_hold(self, _request: Request) -> Answer:
        if self._saver is None or self._suspend_stage != "done":
            raise GuestStateError("the guest is not suspended")
        self._held = True
        return {}, b""

    def op_resume(self, request: Request) -> Answer:
        self._saver, self._held = None, False
        self.paused = self.paused or bool(request.arguments.get("paused"))
        self._resume_cancelled()
        return {}, b""

    # -- life -----------------------------------------------------------------------------------------

    def op_info(self, _request: Request) -> Answer:
        domain = self._domain
        return {
            "state": self._state(domain),
            "vcpus": len(domain.vcpus),
            "memory_bytes": domain.nr_pages() << 12,
        }, b""

    def _state(self, domain: Domain) -> str:
        reason = domain.shutdown_reason
        if reason is None:
            return "paused" if self.paused else "running"
        named = {SHUTDOWN_SUSPEND: "suspended", SHUTDOWN_CRASH: "crashed"}
        return named.get(reason, "shutdown")

    def op_pause(self, _request: Request) -> Answer:
        self.paused = True
        return {}, b""

    def op_unpause(self, _request: Request) -> Answer:
        domain = self._domain
        if self._saver is not None:
            raise GuestStateError("a save or migration of this domain is at work")
        if domain.shutdown_reason is not None and not self._held:
            raise GuestStateError(f"the domain is {self._state(domain)}")
        if not self._building.committed:
            raise GuestStateError("the domain is not complete")
        self._held = False
        self._resume_cancelled()
        self.paused = False
        if domain.clock.virtual:
            domain.clock.extend()
        return {}, b""

    def op_shutdown(self, request: Request) -> Answer:
        domain = self._domain
        if domain.shutdown_reason is not None:
            raise GuestStateError(f"the domain is {self._state(domain)}")
        if domain.clock.virtual:
            domain.clock.extend()
        domain.store.write(f"{domain.home}/control/shutdown", str(request.arguments["reason"]))
        domain.serve_store()
        return {}, b""

    def op_destroy(self, request: Request) -> Answer | None:
        self._process.finished = True
        with contextlib.suppress(OSError):
            (self._process.directory / "dying").touch()
        return {}, b""

    def op_console(self, request: Request) -> None:
        """Answer first: from then on the connection carries console bytes only."""
        self._reply(request.client, {})
        request.client.sock.setblocking(False)
        request.client.console = True

    def op_rename(self, request: Request) -> Answer:
        name = str(request.arguments["name"])
        host = hosts.Host(self._process.machine.directory)
        with host.registry_lock():
            if any(r.name == name for r in host.records()):
                raise NameTaken(f"a domain named {name} exists already on host {host.name}")
            self._process.name = name
            hosts.write_record(self._process.directory, name=name)
        domain = self._domain
        domain.store.write(f"{domain.home}/name", name)
        return {}, b""
