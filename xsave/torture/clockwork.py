"""The laboratory's scheduler: which vCPU runs, for how long, and when a wait is over.

The loop of a domain's process (xsave.host.loop), in virtual time and with nobody to ask: the
same guest goes the same way every time. It is also the adversary. `first` names a vCPU that runs
as long as it can: another one gets a slice only when that one is blocked, has yielded or spins; so
a vCPU that was left in the middle of something stays exactly there until the others wait for it.
"""

from __future__ import annotations

from collections.abc import Callable

from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.hypervisor import Hypercall, Hypervisor

#: Instructions a vCPU may run without crossing into the hypervisor to wait.
SLICE = 100_000
FOR_EVER = 1 << 62
_NO_END = 1 << 40
#: After so many slices without a wait a vCPU is thought to spin for another one.
_SPINS = 20
_SCHED_OP, _YIELD = 29, 0


class Clockwork:
    """Runs one domain. `held`: vCPUs that do not run at all."""

    def __init__(self, hv: Hypervisor) -> None:
        self.hv = hv
        self.domain = hv.domain
        self.first: int | None = None
        self.held: set[int] = set()
        self._turn_of_others = False
        self._yielded = False
        self._nr_slices = 0  # whole ones, of the favoured vCPU, without a break
        hv.table = hv.table | {_SCHED_OP: self._listen(hv.table[_SCHED_OP])}
        self.domain.clock.horizon_ns = FOR_EVER

    def _listen(self, sched_op: Hypercall) -> Hypercall:
        def call(hv: Hypervisor, vcpu: Vcpu, *arguments: int) -> int:
            self._yielded |= arguments[0] == _YIELD
            return sched_op(hv, vcpu, *arguments)

        return call

    def serve(self) -> None:
        """What the domain's process does between two runs: the rings and the timers."""
        domain = self.domain
        domain.serve_console()
        domain.serve_store()
        domain.run_timers(domain.clock.now())

    def turn(self, count: int = SLICE) -> bool:
        """Let one vCPU run, or jump to the next timer. False: nothing will ever happen again."""
        self.serve()
        vcpu = self._next()
        if vcpu is None:
            return self._jump()
        self.hv.switch_to(vcpu)
        self._yielded = False
        self.hv.run(count)
        if not vcpu.blocked:
            self.domain.clock.slice()
        waits = self._yielded or vcpu.blocked
        self._nr_slices = 0 if waits or vcpu.id != self.first else self._nr_slices + 1
        self._turn_of_others = vcpu.id == self.first and (waits or self._nr_slices == _SPINS)
        return True

    def step(self) -> None:
        """Let the vCPU that has the CPU execute one instruction. Events come at crossings only,
        as in a free run: a count of steps is a count of what a free run executes."""
        self.hv.kicked = False
        self.hv.cpu.run(1)

    def run_free(self) -> None:
        """Let the vCPU that has the CPU run until something stops it, as `step` does."""
        self.hv.kicked = False
        self.hv.cpu.run(_NO_END)

    def run(self, over: Callable[[], bool], until_ns: int) -> bool:
        """Take turns until over() or the domain has shut down; False if time ran out first."""
        domain = self.domain
        while not over() and domain.shutdown_reason is None:
            if domain.clock.now() >= until_ns or not self.turn():
                return False
        return True

    def run_for(self, nanoseconds: int) -> None:
        """Take turns for some virtual time, or until the domain shuts down."""
        self.run(lambda: False, self.domain.clock.now() + nanoseconds)

    def _next(self) -> Vcpu | None:
        """The favoured vCPU unless it has just waited; else the next one, round robin."""
        vcpus = self.domain.vcpus
        start = self.hv.vcpu.id + 1
        order = vcpus[start:] + vcpus[:start]
        if self.first is not None:
            order.sort(key=lambda v: (v.id == self.first) == self._turn_of_others)
        for vcpu in order:
            if vcpu.id not in self.held and vcpu.online and self.runnable(vcpu):
                return vcpu
        return None

    def runnable(self, vcpu: Vcpu) -> bool:
        """True if the vCPU may run: not blocked, or what it waits for has come."""
        if not vcpu.blocked:
            return True
        domain = self.domain
        polled = any(domain.events.is_pending(port) for port in vcpu.polling)
        late = vcpu.poll_deadline_ns is not None and vcpu.poll_deadline_ns <= domain.clock.now()
        upcall = vcpu.info.evtchn_upcall_pending and not vcpu.info.evtchn_upcall_mask
        if not (polled or late or upcall):
            return False
        vcpu.blocked, vcpu.polling, vcpu.poll_deadline_ns = False, (), None
        return True

    def _jump(self) -> bool:
        """All wait: to the next timer."""
        online = [v for v in self.domain.vcpus if v.online]
        times = [t for v in online for t in (v.timer_ns, v.poll_deadline_ns) if t is not None]
        if times:
            self.domain.clock.jump(min(times))
        return bool(times)
