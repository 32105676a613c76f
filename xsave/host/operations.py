"""What the control socket asks of a domain, done by its vCPU thread between two runs.

Requests that build a domain or read its state are in building.py, those that suspend, resume and
end it in handover/requests.py (the lease on a suspended guest is in suspension.py), the log of
dirty frames in dirtying.py; here are the dispatch and a domain's life. A connection that builds the
domain holds a lease too: closed before `commit`, the half-built domain is removed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from xsave.errors import (
    ConnectionLost,
    GuestStateError,
    NameTaken,
    StorageError,
    UsageError,
    XsaveError,
)
from xsave.guest.xen.domain import Domain
from xsave.guest.xen.wire import error_message, send_message
from xsave.host.bootconfig import DESTROY, RESTART
from xsave.host.building import Building, availability
from xsave.host.control import Client, Request
from xsave.host.dirtying import Dirtying
from xsave.host.handover.requests import HandoverRequests
from xsave.host.registry import records, registry_lock, write_record
from xsave.host.running import RunningDomain
from xsave.host.suspension import Suspension
from xsave.public import SHUTDOWN_CRASH, SHUTDOWN_NAMES, SHUTDOWN_SUSPEND

#: How long a fresh process waits for the command that started it to say what to build.
_BUILDER_TIMEOUT_S = 30.0
#: Requests that change what the guest does next: a deterministic guest gets them only while it
#: stands still at its horizon, so that real time cannot matter.
_AT_HORIZON = {"suspend", "shutdown", "target", "vcpus", "pause", "unpause"}
#: Requests after which others read the domain's memory: they wait until all of it is there.
_WITH_ALL_MEMORY = {"suspend", "logdirty", "filled"}

Answer = tuple[dict[str, Any], bytes]


class Operations:
    """The requests of one domain process."""

    def __init__(self, running: RunningDomain) -> None:
        self._running = running
        self._building = Building(running)
        self._suspension = Suspension(running, self.after_run)
        self._dirtying = Dirtying(running)
        self._handover = HandoverRequests(running, self._building, self._suspension)
        self._give_up = time.monotonic() + _BUILDER_TIMEOUT_S
        self._held: list[Request] = []
        self._behind: list[Request] = []  # a suspend that is not done yet, from the same client
        self._over = False

    @property
    def _domain(self) -> Domain:
        return self._running.domain

    # -- the loop's side ---

    def deadline_s(self) -> float | None:
        """Seconds until something is given up that did not come, None if nothing is awaited."""
        if not self._running.built:
            return max(self._give_up - time.monotonic(), 0.0)
        return self._suspension.deadline_s()

    def serve(self) -> None:
        """Do all that is queued."""
        self._running.disks.serve()
        if self.must_end():
            self._lose()
        self._handover.see_to_memory()
        if self._held and not self._running.filling.active:
            self._running.control.put_back(self._held)
            self._held = []
        later: list[Request] = []
        while request := self._running.control.next_request():
            # What is asked behind what must wait is answered behind it.
            if request.client in (other.client for other in later):
                later.append(request)
            elif request.op == "closed":
                self._serve_one(request)
            elif self._suspension.keeps_waiting(request.client):
                self._behind.append(request)
            elif request.client in (other.client for other in self._held):
                self._held.append(request)
            elif request.op in _WITH_ALL_MEMORY and self._running.filling.active:
                self._hold(request)
            elif request.op in _AT_HORIZON and self._must_wait():
                later.append(request)
            else:
                self._serve_one(request)
        self._running.control.put_back(later)
        self._hear()
        if self._running.built:
            self._suspension.check()
            self._let_go_behind()
        elif self.deadline_s() == 0.0:
            self._running.finished = True

    def _let_go_behind(self) -> None:
        """Requests are answered in turn. So who wants to know something of the suspended guest has
        asked by now, and does not lose the time that a question takes."""
        if self._behind and not self._suspension.keeps_waiting(self._behind[0].client):
            self._running.control.put_back(self._behind)
            self._behind = []

    def get_ready(self) -> None:
        """Nothing is to be done: the complete copy of a migration waits for the go-ahead."""
        if self._handover.waits:
            self._running.get_ready()

    def _hold(self, request: Request) -> None:
        """Its time comes when the memory is there."""
        self._held.append(request)
        if request.op == "suspend":
            self._reply(request.client, {"event": "its memory is still coming"})

    def must_end(self) -> bool:
        """True if a part of the memory will never come and the guest has not been ended yet."""
        return bool(self._running.filling.lost) and not self._over

    def _lose(self) -> None:
        """Whatever the guest did with the zeros it has found counts for nothing. It stays to be
        looked at: what is to become of a guest that crashes was not meant for this."""
        self._over = True
        domain = self._running.domain
        domain.shutdown_reason = None
        domain.crash(f"a part of its memory was lost: {self._running.filling.lost}")

    def _must_wait(self) -> bool:
        if not self._running.built or self._running.paused:
            return False
        domain = self._domain
        moving = domain.shutdown_reason is None and not self._running.holding()
        return domain.clock.virtual and moving

    def _hear(self) -> None:
        """What was typed is a request too: a deterministic guest hears it at its horizon."""
        running = self._running
        if not running.built or running.paused or self._must_wait():
            return
        if self._domain.shutdown_reason is None and self._domain.console.release():
            self._domain.clock.extend()

    def _serve_one(self, request: Request) -> None:
        if request.op == "closed":
            self._closed(request.client)
            return
        handler = self._handler("op_" + request.op)
        try:
            if handler is None:
                raise UsageError(f"unknown request {request.op!r}")
            answer = handler(request)
        except XsaveError as e:
            answer = self._failed(request, e)
        except (KeyError, TypeError, ValueError) as e:
            answer = self._failed(request, UsageError(f"malformed {request.op} request: {e}"))
        if answer is not None:
            self._reply(request.client, *answer)

    def _failed(self, request: Request, error: XsaveError) -> Answer:
        """Who builds the domain may have asked for the next thing already."""
        if request.client is self._building.builder and not self._building.committed:
            self._building.failure = self._building.failure or str(error)
        return error_message(error), b""

    def _handler(self, name: str) -> Callable[[Request], Answer | None] | None:
        places = (self, self._handover, self._building, self._dirtying)
        return next((getattr(place, name) for place in places if hasattr(place, name)), None)

    def _reply(self, client: Client, message: dict[str, Any], blob: bytes = b"") -> None:
        with contextlib.suppress(ConnectionLost):
            send_message(client.sock, message, blob)

    def _closed(self, client: Client) -> None:
        self._dirtying.closed(client)
        self._held = [request for request in self._held if request.client is not client]
        self._behind = [request for request in self._behind if request.client is not client]
        if not self._handover.whole and self._building.builder in (None, client):
            self._handover.lost_builder()
        elif self._running.built:
            self._suspension.closed(client)

    def after_run(self) -> None:
        """The guest stopped running for whatever reason: did it shut down?"""
        reason = self._domain.shutdown_reason
        if reason is None or self._suspension.active or self._running.filling.lost:
            return
        if reason == SHUTDOWN_SUSPEND:
            if not self._suspension.held:  # a late suspend, nobody waits any more
                self._suspension.resume()
        else:
            self._end(SHUTDOWN_NAMES[reason])

    def _end(self, event: str) -> None:
        """The guest is at its end: destroy the domain, begin again or leave it to be looked at.

        What becomes of it is told on its console, where those are who watch it.
        """
        action = self._building.action_on(event)
        if action == RESTART:
            self._tell(f"{event}: it is started again")
            try:
                self._building.restart()
            except XsaveError as e:
                self._tell(f"it cannot be started again: {e}")
                action = DESTROY
        if action == DESTROY:
            self._running.finished = True

    def _tell(self, message: str) -> None:
        with contextlib.suppress(OSError):
            self._domain.console.put(f"(xsave) {self._running.name}: {message}\n".encode())

    def ended(self) -> None:
        """The loop is over."""
        self._handover.ended()

    # -- life ---

    def op_info(self, _request: Request) -> Answer:
        domain = self._domain
        return {
            "state": self._state(domain),
            "vcpus": len(domain.vcpus),
            "online_vcpus": sum(vcpu.online for vcpu in domain.vcpus),
            # Who asks counts the frames: where a guest is to start that need not be waited for.
            "xen_frames": domain.nr_xen_frames,
        }, b""

    def _state(self, domain: Domain) -> str:
        reason = domain.shutdown_reason
        if reason is None:
            return "paused" if self._running.paused else "running"
        named = {SHUTDOWN_SUSPEND: "suspended", SHUTDOWN_CRASH: "crashed"}
        return named.get(reason, "shutdown")

    def op_pause(self, _request: Request) -> Answer:
        self._running.paused = True
        return {}, b""

    def op_unpause(self, request: Request) -> Answer:
        domain = self._domain
        if self._suspension.active:
            raise GuestStateError("a save or migration of this domain is at work")
        if self._running.filling.lost:
            raise StorageError(f"the guest's memory was lost: {self._running.filling.lost}")
        if domain.shutdown_reason is not None and not self._suspension.held:
            raise GuestStateError(f"the domain is {self._state(domain)}")
        if not self._building.committed:
            raise GuestStateError("the domain is not complete")
        self._handover.start(request.client)
        self._running.paused = False
        domain.clock.extend()
        if domain.never_run:
            domain.start()
        answer, blob = self.op_info(request)
        return answer | {"resumed_ns": domain.clock.wall_ns()}, blob

    def _check_alive(self) -> None:
        """Raise GuestStateError if there is nobody to ask, now or when it goes on."""
        if self._domain.shutdown_reason not in (None, SHUTDOWN_SUSPEND):
            raise GuestStateError(f"the domain is {self._state(self._domain)}")

    def op_shutdown(self, request: Request) -> Answer:
        domain = self._domain
        if domain.shutdown_reason is not None:
            raise GuestStateError(f"the domain is {self._state(domain)}")
        domain.clock.extend()
        domain.store.write(f"{domain.home}/control/shutdown", str(request.arguments["reason"]))
        domain.serve_store()
        return {}, b""

    def op_target(self, request: Request) -> Answer:
        """libxl_set_memory_target: the next save's image says so too."""
        domain, nr_pages = self._domain, int(request.arguments["nr_pages"])
        self._check_alive()
        if not 0 < nr_pages <= domain.max_pages:
            raise UsageError(
                f"{nr_pages * 4} KiB of memory: the domain may have up to {domain.max_pages * 4}"
            )
        self._building.set_target(nr_pages)
        domain.clock.extend()
        domain.store.write(f"{domain.home}/memory/target", str(nr_pages * 4))
        domain.serve_store()
        return {}, b""

    def op_vcpus(self, request: Request) -> Answer:
        """libxl_set_vcpuonline: the next save's image says so too."""
        domain, number = self._domain, int(request.arguments["number"])
        self._check_alive()
        if not 0 < number <= len(domain.vcpus):
            raise UsageError(f"{number} vCPUs: the domain has {len(domain.vcpus)}")
        self._building.set_available_vcpus(number)
        domain.clock.extend()
        for vcpu in domain.vcpus:
            node = f"{domain.home}/cpu/{vcpu.id}/availability"
            domain.store.write(node, availability(vcpu.id < number))
        domain.serve_store()
        return {}, b""

    def op_console(self, request: Request) -> None:
        """Answer first: from then on the connection carries console bytes only."""
        request.client.typing = True
        self._reply(request.client, {})
        with contextlib.suppress(OSError):  # it may be gone already
            request.client.sock.setblocking(False)
            request.client.console = True

    def op_takeover(self, request: Request) -> Answer:
        """A migration's copy becomes the guest: the source has given up the disks, and its name
        here is free."""
        self._running.disks.open()
        self._rename(str(request.arguments["name"]))
        return self.op_unpause(request)

    def _rename(self, name: str) -> None:
        machine = self._running.machine
        with registry_lock(machine.directory):
            if any(r.name == name for r in records(machine.directory)):
                raise NameTaken(f"a domain named {name} exists already on host {machine.name}")
            self._running.name = name
            building = not self._building.committed
            write_record(self._running.directory, name=name, building=building)
        domain = self._domain
        domain.store.write(f"{domain.home}/name", name)
