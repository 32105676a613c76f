"""One clock per domain: what system_time, rdtsc and the timers go by.

Times are nanoseconds since the domain was first built; a restored domain goes on from the nsec
of its X86_TSC_INFO record, so the guest's clock never goes back. The clock stands still until
`start()` (the first unpause).

RealClock follows the host's monotonic clock. VirtualClock moves only when the guest does
something: a step per crossing into the hypervisor, a step per slice of instructions, a jump to
the next timer when the guest is idle. It holds at its horizon until a command moves that on, so
that a sequence of commands gives the same guest state whatever the real time between them.
"""

from __future__ import annotations

import time

NS_PER_S = 1_000_000_000
#: TSC frequency of a new domain: 1 GHz, so that a tick is a nanosecond on every host.
DEFAULT_TSC_KHZ = 1_000_000
VIRTUAL_STEP_NS = 2_000
VIRTUAL_SLICE_NS = 100_000
#: How far a deterministic guest runs for each command that lets it run.
VIRTUAL_HORIZON_NS = 5 * NS_PER_S
#: Wall-clock time at which a deterministic guest's system_time was 0 (2008-05-23 14:41:07 UTC).
VIRTUAL_EPOCH_S = 1_211_553_667


class RealClock:
    """Host time. All methods are cheap: they run at every crossing."""

    virtual = False
    horizon_ns = 1 << 63

    def __init__(self, origin_ns: int = 0, khz: int = DEFAULT_TSC_KHZ) -> None:
        self._origin = origin_ns
        self._start: int | None = None
        self.khz = khz

    def start(self) -> None:
        if self._start is None:
            self._start = time.monotonic_ns()

    def now(self) -> int:
        if self._start is None:
            return self._origin
        return self._origin + time.monotonic_ns() - self._start

    @property
    def offset_ns(self) -> int:
        """What a clock that goes is ahead of the host's monotonic clock."""
        assert self._start is not None
        return self._origin - self._start

    def step(self) -> None:
        """A crossing happened."""

    def slice(self) -> None:
        """A slice of instructions ran to its end."""

    def extend(self) -> None:
        """A command lets the guest run on: real time does not wait for any."""

    def jump(self, to_ns: int) -> None:
        """The guest is idle until then: real time comes by itself."""

    def rdtsc(self) -> int:
        return self.now() * self.khz // 1_000_000

    def wallclock_ns(self) -> int:
        """Wall time (ns since 1970) at system_time 0."""
        return time.time_ns() - self.now()

    def wall_ns(self) -> int:
        """Wall time (ns since 1970) now, as the guest reads it from these two."""
        return self.wallclock_ns() + self.now()


class VirtualClock(RealClock):
    """Time that only the guest moves."""

    virtual = True

    def __init__(self, origin_ns: int = 0, khz: int = DEFAULT_TSC_KHZ) -> None:
        super().__init__(origin_ns, khz)
        self._now = origin_ns
        self.horizon_ns = origin_ns

    def start(self) -> None:
        self._start = 0

    def extend(self) -> None:
        """Let the guest run one horizon further."""
        self.horizon_ns = self._now + VIRTUAL_HORIZON_NS

    def now(self) -> int:
        return self._now

    def step(self) -> None:
        self._now += VIRTUAL_STEP_NS

    def slice(self) -> None:
        self._now += VIRTUAL_SLICE_NS

    def jump(self, to_ns: int) -> None:
        """Skip idle time, never beyond the horizon."""
        self._now = max(self._now, min(to_ns, self.horizon_ns))

    def rdtsc(self) -> int:
        self.step()
        return self._now * self.khz // 1_000_000

    def wallclock_ns(self) -> int:
        return VIRTUAL_EPOCH_S * NS_PER_S


def scale(khz: int) -> tuple[int, int]:
    """Return (tsc_to_system_mul, tsc_shift) of a TSC of this frequency (set_time_scale)."""
    shift = 0
    ticks = khz * 1000
    while ticks > 2 * NS_PER_S:
        ticks >>= 1
        shift -= 1
    while ticks <= NS_PER_S:
        ticks <<= 1
        shift += 1
    return (NS_PER_S << 32) // ticks, shift
