"""rounds: pre-copy, driven by what it measures, until the policy has decided.

    send a round -> look what was written meanwhile -> measure -> precopy.decide() -> ...

The guest runs all the time, throttled if the policy says so. What ends here is only the copying:
to suspend, hand over or give up is migrate.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from xsave.frames import PAGE_SIZE
from xsave.guest.xen.domctl import Domctl
from xsave.live import LiveWriter
from xsave.live import Round as Sent
from xsave.precopy import (
    CONTINUE,
    POSTCOPY,
    Decision,
    Limits,
    Progress,
    Stats,
    decide,
    simulate,
    simulate_postcopy,
)
from xsave.progress import Decided, Report, Round

#: What a stop takes besides looking once more and sending: the vCPUs, the page tables at the other
#: end, the hand-over. Measured (bench/bench_migrate.py).
HAND_OVER_S = 0.015
#: A smaller round says nothing about the bandwidth.
_MEASURED_BYTES = 1 << 20
#: Two looks at least so far apart: a dirty rate of less says nothing.
_MIN_ROUND_S = 0.01
#: What the other end does about a page table, a page of the p2m or any page once it has come, ahead
#: of the stop. While the first round is on its way it has no time for that.
_TABLE_S, _P2M_PAGE_S, _PAGE_S = 6e-5, 4e-5, 1.5e-6
#: What a round leaves out makes the next one no sooner: a guest may calm down meanwhile. At most:
_WAIT_S = 5.0
_SAMPLES_S = (0.02, 0.05, 0.1, 0.2, 0.4)


def dirty_after(seconds: float, looks: Sequence[tuple[float, float]]) -> float:
    """Return how many bytes get dirty in so many seconds, by looks at it, (seconds, bytes), the
    first of them (0, 0): between two in proportion, beyond the last as from the one before."""
    known = next((i for i, (at, _) in enumerate(looks) if at >= seconds), len(looks) - 1)
    (a, low), (b, high) = looks[max(known, 1) - 1], looks[max(known, 1)]
    return max(low + (high - low) * (seconds - a) / max(b - a, 1e-6), 0.0)


class Precopy:
    """The rounds of one migration."""

    def __init__(
        self,
        domctl: Domctl,
        writer: LiveWriter,
        limits: Limits,
        report: Report,
        wire_bytes: Callable[[], int],
        flush: Callable[[], None],
    ) -> None:
        """wire_bytes(): how many bytes have left so far, compressed if they are. flush(): have all
        leave that was written."""
        self._domctl = domctl
        self._writer = writer
        self._limits = limits
        self._report = report
        self._wire_bytes = wire_bytes
        self._flush = flush
        self._began = self._looked = time.monotonic()
        self._progress = Progress()
        self._throttle = 0
        self._bandwidth = 0.0
        self.nr_rounds = 0

    def _send(self) -> tuple[Sent, Stats]:
        """Send a round, all of it: what it is about the other end begins with at once."""
        before, began = self._wire_bytes(), time.monotonic()
        sent = self._writer.send_round()
        self._flush()
        sent = replace(sent, seconds=time.monotonic() - began)
        self.nr_rounds += 1
        return sent, self._measure(sent, self._wire_bytes() - before)

    def run(self) -> Decision:
        """Send rounds until there is a decision that ends them."""
        while True:
            sent, stats = self._send()
            decision = decide(stats, self._limits)
            self._tell(sent, stats, decision)
            if decision.action != CONTINUE:
                return decision
            if decision.throttle_percent != self._throttle:
                self._throttle = decision.throttle_percent
                self._domctl.throttle(self._throttle)
                self._progress.begin_anew()
            self._wait_for(sent.skipped_pages * PAGE_SIZE)

    def run_once(self) -> Decision:
        """Send one round, behind which the guest is to go whatever is left: post-copy."""
        sent, stats = self._send()
        pages = stats.pending_bytes // PAGE_SIZE
        reason = f"one round is through, what was written since ({pages} pages) follows the guest"
        decision = Decision(POSTCOPY, reason, stats.overhead_s)
        self._tell(sent, stats, decision)
        return decision

    def _wait_for(self, skipped_bytes: int) -> None:
        """Let as much time pass as it would have taken to send these."""
        left_s = self._limits.timeout_s - (time.monotonic() - self._began)
        time.sleep(max(0.0, min(skipped_bytes / max(self._bandwidth, 1.0), left_s, _WAIT_S)))

    def _measure(self, sent: Sent, wire_bytes: int) -> Stats:
        settle_s = 0.0
        if self.nr_rounds == 1:
            writer = self._writer
            settle_s = writer.nr_tables * _TABLE_S + writer.nr_p2m_pages * _P2M_PAGE_S
            settle_s += (sent.nr_pages - sent.zero_pages) * _PAGE_S
        time.sleep(max(_MIN_ROUND_S - sent.seconds, settle_s))
        grew, looks = self._writer.growth, time.monotonic()
        self._writer.look()
        now = time.monotonic()
        interval, self._looked = looks - self._looked, looks
        pending = self._writer.pending_bytes
        grew = [*grew, (interval, float(pending))]
        self._progress.saw(pending)
        if wire_bytes >= _MEASURED_BYTES or not self._bandwidth:
            # Of the image's bytes, as the pending ones are: compressed they are worth more.
            self._bandwidth = sent.nr_bytes / max(sent.seconds, 1e-6)
        return Stats(
            nr_rounds=self.nr_rounds,
            elapsed_s=now - self._began,
            pending_bytes=pending,
            dirty_rate=pending / max(interval, _MIN_ROUND_S),
            bandwidth=self._bandwidth,
            overhead_s=HAND_OVER_S + now - looks,
            stalled_rounds=self._progress.stalled_rounds,
            throttle_percent=self._throttle,
            again_bytes=dirty_after(pending / max(self._bandwidth, 1.0), grew),
        )

    def _tell(self, sent: Sent, stats: Stats, decision: Decision) -> None:
        self._report(
            Round(
                operation="migrate",
                number=self.nr_rounds,
                nr_pages=sent.nr_pages,
                zero_pages=sent.zero_pages,
                deferred_pages=sent.deferred_pages,
                nr_bytes=sent.nr_bytes,
                seconds=sent.seconds,
                pending_pages=stats.pending_bytes // PAGE_SIZE,
                dirty_rate=stats.dirty_rate,
                bandwidth=stats.bandwidth,
                estimated_downtime_s=stats.downtime_s,
                skipped_pages=sent.skipped_pages,
            )
        )
        self._report(
            Decided(
                "migrate",
                decision.action,
                decision.reason,
                decision.estimated_downtime_s,
                decision.throttle_percent,
            )
        )


@dataclass(frozen=True)
class DryRun:
    """What a migration would take, by a sample of the guest's writes. Rates in bytes a second."""

    dirty_log: str
    outcome: str
    reason: str
    dirty_rate: float
    bandwidth: float
    memory_bytes: int
    nr_rounds: int
    total_ns: int
    downtime_ns: int
    bytes_sent: int


def dry_run(
    domctl: Domctl,
    writer: LiveWriter,
    dirty_log: str,
    bandwidth: float,
    limits: Limits | None,
) -> DryRun:
    """Estimate a migration, one with post-copy if there are no limits; the writer's output leads
    nowhere, and all of it is written once."""
    writer.begin()
    sent = writer.send_round()
    looks: list[tuple[float, float]] = [(0.0, 0.0)]
    look_s = 0.0
    for seconds in _SAMPLES_S:
        writer.forget_pending()
        began = time.monotonic()
        writer.look()
        look_s = time.monotonic() - began
        writer.forget_pending()
        time.sleep(seconds)
        interval = time.monotonic() - began
        writer.look()
        looks.append((interval, float(writer.pending_bytes)))

    first_bytes = sent.nr_bytes + sent.skipped_pages * PAGE_SIZE
    dirty_bytes = partial(dirty_after, looks=looks)
    known = first_bytes, dirty_bytes, bandwidth, HAND_OVER_S + look_s
    estimate = simulate(*known, limits) if limits else simulate_postcopy(*known)
    interval, written = looks[-1]
    return DryRun(
        dirty_log=dirty_log,
        outcome=estimate.outcome,
        reason=estimate.reason,
        dirty_rate=written / interval,
        bandwidth=bandwidth,
        memory_bytes=domctl.info().memory_bytes,
        nr_rounds=estimate.nr_rounds,
        total_ns=int(estimate.total_s * 1e9),
        downtime_ns=int(estimate.downtime_s * 1e9),
        bytes_sent=estimate.bytes_sent,
    )
