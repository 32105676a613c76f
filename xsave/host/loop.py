"""The loop of a domain's process: it runs the vCPUs and does what the control socket asks.

The vCPU loop below is the only place that changes the domain; requests are done between two runs
of the guest (operations.py), at once when it blocks.
"""

from __future__ import annotations

import select
import socket
import traceback
from pathlib import Path

from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.domain import Domain
from xsave.host import host as hosts
from xsave.host.control import Control, Ticker
from xsave.host.operations import Operations
from xsave.host.running import RunningDomain
from xsave.host.unpacking import Unpacking

#: Instructions per slice of a deterministic guest.
SLICE_INSTRUCTIONS = 100_000
#: How long a guest for which something is due may take to cross into the hypervisor by itself.
GRACE_S = 0.002
_NS_PER_S = 1_000_000_000
_LONGEST_WAIT_S = 3600.0
#: How long a domain that ends waits for who reads its console.
_LAST_WORDS_S = 1.0


class DomainProcess:
    """The loop of one domain."""

    def __init__(self, running: RunningDomain) -> None:
        self.running = running
        self._control = running.control
        self._control.on_input = self._type
        self._operations = Operations(running)
        self._ticker = Ticker(
            GRACE_S,
            crossings=self._crossings,
            wanted=self._wanted,
            kick=lambda: self.running.xen.kick(),
            due=self._due,
            stop=lambda: self.running.xen.interrupt(),
        )

    @property
    def _domain(self) -> Domain:
        return self.running.domain

    # -- called by other threads ---

    def _type(self, data: bytes) -> bool:
        return not self.running.built or self._domain.console.type(data)

    def _crossings(self) -> int:
        return self.running.xen.nr_crossings if self.running.built else 0

    def _wanted(self) -> bool:
        return (
            self._control.has_requests()
            or self._operations.deadline_s() == 0.0
            or self._another_waits()
            or self.running.disks.has_done()
            or self.running.throttle.rest_s() > 0.0
            or self._operations.must_end()
        )

    def _another_waits(self) -> bool:
        """True if another vCPU could run: they take turns, a tick each."""
        domain, mine = self._domain, self.running.xen.vcpu
        return any(
            vcpu.online and vcpu is not mine and (not vcpu.blocked or domain.wakes(vcpu))
            for vcpu in domain.vcpus
        )

    def _due(self) -> bool:
        if self._wanted():
            return True
        domain = self._domain
        now = domain.clock.now()
        return any(v.timer_ns is not None and v.timer_ns <= now for v in domain.vcpus)

    # -- the loop ---

    def serve(self) -> None:
        """Run until the domain is destroyed."""
        self._control.start()
        self._ticker.start()
        while not self.running.finished:
            self._operations.serve()
            if self.running.finished:
                break
            if not self._runnable():
                self._operations.get_ready()
                self._wait(self._operations.deadline_s())
            elif rest_s := self.running.throttle.rest_s():
                self._wait(rest_s)
            else:
                self._run_guest()
        self._operations.ended()
        self._control.drain(_LAST_WORDS_S)

    def _runnable(self) -> bool:
        return (
            self.running.built
            and not self.running.paused
            and self._domain.shutdown_reason is None
            and not self.running.holding()
        )

    def _run_guest(self) -> None:
        domain, hv = self._domain, self.running.xen
        try:
            if not hv.powered:
                self.running.power_on()
            domain.serve_console()
            domain.serve_store()
            domain.run_timers(domain.clock.now())
            vcpu = self._next_vcpu()
            if vcpu is None:
                self._idle()
                return
            hv.switch_to(vcpu)
            counted = domain.clock.virtual  # where it stands must not depend on real time
            if not counted:
                self._ticker.running.set()
            hv.run(SLICE_INSTRUCTIONS if counted else 0)
        except Exception as e:  # noqa: BLE001 - a bug of ours must not take the control socket down
            domain.crash(f"hypervisor: {type(e).__name__}: {e}")
            domain.console.put(traceback.format_exc().encode())
        finally:
            self._ticker.rest()
        if not hv.vcpu.blocked:
            domain.clock.slice()
        self._operations.after_run()

    def _next_vcpu(self) -> Vcpu | None:
        """Return the next runnable vCPU after the one that ran last, round robin."""
        vcpus = self._domain.vcpus
        start = self.running.xen.vcpu.id + 1
        for vcpu in vcpus[start:] + vcpus[:start]:
            if vcpu.online and (not vcpu.blocked or self._unblock(vcpu)):
                return vcpu
        return None

    def _unblock(self, vcpu: Vcpu) -> bool:
        """True if the blocked vCPU may run; it does not block any more then."""
        if not self._domain.wakes(vcpu):
            return False
        vcpu.blocked, vcpu.polling, vcpu.poll_deadline_ns = False, (), None
        return True

    def _idle(self) -> None:
        """Nothing to run: wait for the next timer (or jump to it, in virtual time)."""
        domain = self._domain
        waiting = [t for v in domain.vcpus if v.online for t in (v.timer_ns, v.poll_deadline_ns)]
        times = [t for t in waiting if t is not None]
        if domain.clock.virtual:
            domain.clock.jump(min(times, default=domain.clock.horizon_ns))
            return
        wait = (min(times) - domain.clock.now()) / _NS_PER_S if times else None
        deadline = self._operations.deadline_s()
        waits = [w for w in (wait, deadline) if w is not None]
        # A guest may ask for a timer in 600 years, select() for no such wait.
        self._wait(max(min(*waits, _LONGEST_WAIT_S), 0.0) if waits else None)

    def _wait(self, seconds: float | None) -> None:
        if not self._control.has_requests():
            select.select([self._control.wake_fd], [], [], seconds)
        self._control.clear_wake()


def live(
    host_directory: Path,
    domid: int,
    name: str,
    descriptors: list[int],
    unpacking: Unpacking | None,
) -> None:
    """Be a domain, until it is destroyed. descriptors: the listening socket, the locked `alive`
    file and, for a lazy restore, the image's. unpacking: of the kernel it may be built from."""
    listener, alive, *lazy = descriptors
    host = hosts.Host(host_directory)
    directory = host.directory / "domains" / str(domid)
    control = Control(socket.socket(fileno=listener))
    running = RunningDomain(directory, host.machine, domid, name, control, alive, lazy)
    running.unpacking = unpacking
    try:
        DomainProcess(running).serve()
    finally:
        running.remove()
