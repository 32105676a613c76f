"""When a live migration stops copying and suspends the guest: a pure function of statistics.

    after each round    pending, dirty rate, bandwidth  ->  decide()  ->  continue | stop-and-copy
                                                                          | cancel

It stops as soon as what is pending can be sent within the downtime that was asked for, but for the
very first round, which took so long that one more, short one is worth it; unless the guest would
write more than half of that again before it is through. It also stops
when the time or the rounds are up, and when rounds do not bring the pending bytes down any more;
what happens then the operator has chosen:

    stop-and-copy   the default, as with xl: who migrates wants the guest moved, often off a host
                    that is going down, and a longer stop is the lesser evil. How long is said.
    cancel          the promise of --downtime counts more: the guest stays where it is.

With auto-converge, a round that brought nothing throttles the vCPUs, each time a little more.
Xen's own policy (simple_precopy_policy: 5 rounds, or 50 pages left) knows no times; QEMU and Cloud
Hypervisor compare the same estimate with a limit. A leaf: imports nothing, knows no guest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

CONTINUE, STOP, CANCEL = "continue", "stop-and-copy", "cancel"
#: Not decided here: what was asked for.
POSTCOPY = "post-copy"
DEFAULT_DOWNTIME_S = 0.3
DEFAULT_TIMEOUT_S = 120.0
MAX_ROUNDS = 30
#: A round that leaves more than this part of the least that was pending brought nothing.
_PROGRESS = 0.9
#: So many rounds in a row that brought nothing: more will not either.
_HOPELESS_ROUNDS = 3
#: So little is not worth a second round.
_FEW_BYTES = 1 << 20
#: Nor is what leaves more than this part of what is pending.
_WORTHWHILE = 0.5
#: QEMU's defaults for cpu-throttle-initial, -increment and max-cpu-throttle.
_THROTTLE_FIRST, _THROTTLE_STEP, _THROTTLE_MAX = 20, 10, 99


@dataclass(frozen=True)
class Limits:
    """What the operator asked for. on_timeout: STOP or CANCEL."""

    downtime_s: float = DEFAULT_DOWNTIME_S
    timeout_s: float = DEFAULT_TIMEOUT_S
    on_timeout: str = STOP
    auto_converge: bool = False
    max_rounds: int = MAX_ROUNDS


@dataclass(frozen=True)
class Stats:
    """Where a migration is. Rates in bytes a second.

    pending_bytes: what would have to be sent after a suspend now; overhead_s: what such a stop
    takes besides; stalled_rounds: rounds in a row that did not bring the pending bytes down;
    again_bytes: what would be written while the pending bytes are sent.
    """

    nr_rounds: int
    elapsed_s: float
    pending_bytes: int
    dirty_rate: float
    bandwidth: float
    overhead_s: float = 0.0
    stalled_rounds: int = 0
    throttle_percent: int = 0
    again_bytes: float = 0.0

    @property
    def downtime_s(self) -> float:
        """The estimate: infinite without bandwidth."""
        if not self.pending_bytes:
            return self.overhead_s
        if self.bandwidth <= 0:
            return float("inf")
        return self.overhead_s + self.pending_bytes / self.bandwidth


@dataclass(frozen=True)
class Decision:
    """What to do next, why, and how long the guest would stand still if it were suspended now.

    throttle_percent: how much the vCPUs are to rest meanwhile."""

    action: str
    reason: str
    estimated_downtime_s: float
    throttle_percent: int = 0


def decide(stats: Stats, limits: Limits) -> Decision:
    """Say what to do after a round."""
    estimate = stats.downtime_s
    percent = stats.throttle_percent

    def decision(action: str, reason: str, throttle: int = percent) -> Decision:
        return Decision(action, reason, estimate, throttle)

    would = f"it would stand still for {_ms(estimate)}"
    if estimate <= limits.downtime_s:
        within = f"{_ms(estimate)} of downtime are within {_ms(limits.downtime_s)}"
        if stats.nr_rounds > 1 or stats.pending_bytes <= _FEW_BYTES:
            return decision(STOP, within)
        if stats.again_bytes > stats.pending_bytes * _WORTHWHILE:
            return decision(STOP, f"{within}, and one round more would not halve them")
    if stats.elapsed_s >= limits.timeout_s:
        return decision(limits.on_timeout, f"{limits.timeout_s:g} s are over; {would}")
    if stats.nr_rounds >= limits.max_rounds:
        return decision(limits.on_timeout, f"{stats.nr_rounds} rounds were not enough; {would}")
    throttles = limits.auto_converge and percent < _THROTTLE_MAX
    rates = f"the guest writes {_rate(stats.dirty_rate)} of {_rate(stats.bandwidth)} sent"
    if stats.stalled_rounds and throttles:
        more = min(percent + _THROTTLE_STEP, _THROTTLE_MAX) if percent else _THROTTLE_FIRST
        return decision(CONTINUE, f"{rates}: its vCPUs rest for {more} % of the time", more)
    if stats.stalled_rounds >= _HOPELESS_ROUNDS and limits.on_timeout == STOP:
        return decision(STOP, f"{rates}, more rounds would bring nothing; {would}")
    if estimate <= limits.downtime_s:
        return decision(CONTINUE, f"one round more makes {_ms(estimate)} of downtime less")
    return decision(CONTINUE, f"{_ms(estimate)} of downtime are more than asked for")


class Progress:
    """Counts the rounds in a row that brought nothing."""

    def __init__(self) -> None:
        self._least: float = float("inf")
        self.stalled_rounds = 0

    def saw(self, pending_bytes: int) -> None:
        """Another round is over."""
        if pending_bytes > self._least * _PROGRESS:
            self.stalled_rounds += 1
        else:
            self.stalled_rounds = 0
        self._least = min(self._least, pending_bytes)

    def begin_anew(self) -> None:
        """The guest was throttled: what comes now is not to be measured by what was."""
        self._least, self.stalled_rounds = float("inf"), 0


@dataclass(frozen=True)
class Estimate:
    """How a migration would go, if all stays as it was measured."""

    outcome: str
    reason: str
    nr_rounds: int
    total_s: float
    downtime_s: float
    bytes_sent: int


def simulate(
    first_bytes: int,
    dirty_bytes: Callable[[float], float],
    bandwidth: float,
    overhead_s: float,
    limits: Limits,
) -> Estimate:
    """Play a migration through: dirty_bytes(s) are written in so many seconds.

    A throttled guest is taken to write so much less. Of what is written again while a round is
    sent, half had not had its turn, and is left out."""
    stats = Stats(0, 0.0, first_bytes, 0.0, max(bandwidth, 1.0), overhead_s)
    progress, sent, pending = Progress(), 0, first_bytes
    while True:
        seconds = max(pending / stats.bandwidth, 1e-3)
        share = 1 - stats.throttle_percent / 100
        again = int(min(dirty_bytes(seconds * share), first_bytes))
        sent += pending - min(again, pending) // 2
        pending = again
        progress.saw(pending)
        stats = replace(
            stats,
            nr_rounds=stats.nr_rounds + 1,
            elapsed_s=stats.elapsed_s + seconds,
            pending_bytes=pending,
            dirty_rate=pending / seconds,
            stalled_rounds=progress.stalled_rounds,
            again_bytes=dirty_bytes(pending / stats.bandwidth * share),
        )
        decision = decide(stats, limits)
        if decision.action != CONTINUE:
            break
        if decision.throttle_percent != stats.throttle_percent:
            progress.begin_anew()
        stats = replace(stats, throttle_percent=decision.throttle_percent)
    stops = decision.action == STOP
    downtime_s = stats.downtime_s if stops else 0.0
    total_s = stats.elapsed_s + downtime_s
    sent += pending if stops else 0
    return Estimate(decision.action, decision.reason, stats.nr_rounds, total_s, downtime_s, sent)


def simulate_postcopy(
    first_bytes: int,
    dirty_bytes: Callable[[float], float],
    bandwidth: float,
    overhead_s: float,
) -> Estimate:
    """The same of a guest that goes after one round, and what it wrote meanwhile behind it."""
    seconds = first_bytes / max(bandwidth, 1.0)
    behind = int(min(dirty_bytes(seconds), first_bytes))
    total_s = seconds + overhead_s + behind / max(bandwidth, 1.0)
    reason = f"after one round, {behind >> 10} KiB follow the guest"
    return Estimate(POSTCOPY, reason, 1, total_s, overhead_s, first_bytes + behind)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < float("inf") else "for ever"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / (1 << 20):.1f} MiB/s"
