"""Live migration: the target's memory is the source's at its suspend, whatever the guest writes.

The oracle compares page by page, by pfn, between READY and GO. The guest has its own: it checks
what it wrote before it writes again.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.flows.flow import MIB, console, create, nothing_is_left, runs_on, state, wait_for
from tests.flows.live import ROUNDS, Oracle, migrate_live, moved, start
from xsave import precopy
from xsave.errors import GuestStateError, MigrationCancelled
from xsave.guest.xen import logdirty
from xsave.guest.xen.logdirty import COMPARE, KINDS, USERFAULTFD
from xsave.host.transport import Receiver
from xsave.live import LiveWriter
from xsave.precopy import CANCEL, Limits
from xsave.progress import Decided, Round, Stage


@pytest.fixture(params=KINDS)
def kind(request, host):
    """A kind of log this machine can have."""
    if request.param == USERFAULTFD and host.info()["dirty_log"] != USERFAULTFD:
        pytest.skip("this kernel cannot log writes by write protection")
    return request.param


def unhurried(send_round):
    """Rounds behind each of which the guest has the time to write, however busy the machine is."""

    def send(writer):
        sent = send_round(writer)
        time.sleep(0.1)
        return sent

    return send


def test_the_target_has_the_source_as_it_was(host, target, kind, monkeypatch):
    """Five rounds of a heavy writer, and not one page differs; each round is reported with the
    decision behind it, and the guest's own checks stay clean."""
    oracle, events = Oracle(monkeypatch, target), []
    monkeypatch.setattr(LiveWriter, "send_round", unhurried(LiveWriter.send_round))
    monkeypatch.setattr(precopy, "_HOPELESS_ROUNDS", 99)  # all the rounds there may be
    start(host, vcpus=2)
    result = migrate_live(host, target, dirty_log=kind, report=events.append)
    assert oracle.found.different == ()
    assert oracle.found.equal_pages > 3000
    assert oracle.found.equal_tables > 20
    assert result.dirty_log == kind
    assert Stage("migrate", "log dirty", kind) in events
    rounds = [event for event in events if isinstance(event, Round)]
    assert [event.number for event in rounds] == [1, 2, 3, 4, 5]
    assert all(event.pending_pages > 100 for event in rounds)
    assert rounds[0].nr_pages + rounds[0].skipped_pages > 4000 > rounds[1].nr_pages
    decisions = [event for event in events if isinstance(event, Decided)]
    assert [event.action for event in decisions] == ["continue"] * 4 + ["stop-and-copy"]
    assert all(event.reason for event in decisions)
    assert result.nr_rounds == 6
    moved(host, target)


def blind(frames):
    """Every tenth frame is never named by a log, whatever is written to it."""

    def of(*args, **kwargs):
        written = frames(*args, **kwargs)
        return written[written % 10 != 0]

    return of


def test_a_log_that_misses_pages_is_caught(host, target, kind, monkeypatch):
    """The oracle sees it when the log is blind for every tenth frame (the mutation that the test
    above is there for)."""
    oracle = Oracle(monkeypatch, target)
    of, name = {
        USERFAULTFD: (logdirty, "_frames"),
        COMPARE: (logdirty.CompareLog, "_compare"),
    }[kind]
    monkeypatch.setattr(of, name, blind(getattr(of, name)))
    monkeypatch.setattr(LiveWriter, "send_round", unhurried(LiveWriter.send_round))
    start(host, cmdline="touch=1M write=4M rate=40M threads=0")  # its page tables stay
    migrate_live(host, target, dirty_log=kind)
    assert len(oracle.found.different) > 30


def test_a_guest_whose_memory_changes_meanwhile(host, target, kind, monkeypatch):
    """The balloon takes memory and gives it back while rounds run: frames of pfns come, go and
    change, and the target has just the guest's."""
    oracle = Oracle(monkeypatch, target)
    start(host, cmdline="touch=1M write=2M rate=20M")
    sizes = iter((12 * MIB, 14 * MIB, 11 * MIB, 15 * MIB, 13 * MIB))

    def balloon(event):
        if isinstance(event, Round):
            with host.find("g") as other:
                other.set_target(next(sizes) >> 12)
            time.sleep(0.2)

    result = migrate_live(host, target, dirty_log=kind, report=balloon)
    assert oracle.found.different == ()
    assert result.nr_rounds > 3
    assert oracle.found.nr_pages < 4096
    moved(host, target)


def test_deferred_page_tables(host, target, monkeypatch):
    """A page table that names a frame which is not the guest's goes as XTAB while it runs, and is
    sent after all."""
    oracle, late, rounds = Oracle(monkeypatch, target), [], []
    honest = LiveWriter._resolving

    def resolving(self, pfns, types):
        """Nothing resolves at this moment."""
        late.append(np.isin(types[pfns], (1, 2, 3, 4, 9, 10, 11, 12)).sum())
        tables, _ = honest(self, pfns, types)
        types[tables] = 0xF
        self._pending[tables] = True
        return tables[:0], np.empty((0, 512), np.uint64)

    def report(event):
        if isinstance(event, Round):
            rounds.append((event.deferred_pages, sum(late)))
            late.clear()

    monkeypatch.setattr(LiveWriter, "_resolving", resolving)
    start(host)
    migrate_live(host, target, report=report)
    assert rounds
    assert all(deferred == found > 0 for deferred, found in rounds), rounds
    assert oracle.found.different == ()
    moved(host, target)


def test_empty_pages_cost_next_to_nothing(host, target):
    """A guest that uses little of its memory: hardly more is sent than that."""
    start(host, cmdline="touch=4M threads=0", memory_bytes=32 * MIB)
    with host.find("g") as domctl:
        machine = domctl.machine
        mine = np.flatnonzero(machine.owner == domctl.domid)
        full = np.count_nonzero(machine.mem[mine[machine.resident(mine)]].any(axis=1)) << 12
    result = migrate_live(host, target, limits=Limits())
    assert full < 8 * MIB
    assert result.bytes_sent < 1.1 * full
    moved(host, target)


def test_compressed(host, target, monkeypatch):
    """zstd on the wire: fewer bytes, the same guest."""
    oracle = Oracle(monkeypatch, target)
    start(host, cmdline="touch=8M")
    result = migrate_live(host, target, limits=Limits(), compress_level=1)
    assert oracle.found.different == ()
    assert result.bytes_sent < 6 * MIB
    moved(host, target)


def test_each_round_leaves_whole(host, target, monkeypatch):
    """Nothing of a round waits in the compressor while the sender looks what was written since:
    the other end has it all, and the time to work on it."""
    start(host, cmdline="touch=2M threads=0")
    channels, left = [], []
    channel_of, look = Receiver.channel, LiveWriter.look

    def channel(receiver, *options):
        channels.append(channel_of(receiver, *options))
        return channels[-1]

    def looking(writer):
        before = channels[-1].wire_bytes()
        channels[-1].flush()
        left.append(channels[-1].wire_bytes() - before)
        look(writer)

    monkeypatch.setattr(Receiver, "channel", channel)
    monkeypatch.setattr(LiveWriter, "look", looking)
    result = migrate_live(host, target, limits=Limits(), compress_level=1)
    assert left == [0] * (result.nr_rounds - 1)
    assert left


def test_a_bandwidth_is_kept(host, target):
    """8 MiB at 8 MiB/s take a second at least."""
    start(host, cmdline="touch=8M")
    began = time.monotonic()
    result = migrate_live(host, target, limits=Limits(), bandwidth=8 * MIB)
    assert result.bytes_sent > 8 * MIB
    assert time.monotonic() - began > result.bytes_sent / (8 * MIB) - 0.2
    moved(host, target)


def test_what_is_written_all_the_time_is_sent_once(host, target, monkeypatch):
    """Not in the first round, nor in another that would bring nothing; at the stop, and as it is
    then. Each page that the guest rewrites within a round comes only once."""
    if host.info()["dirty_log"] != USERFAULTFD:
        pytest.skip("this kernel cannot log writes by write protection")
    oracle, events = Oracle(monkeypatch, target), []
    start(host, cmdline="touch=8M write=16M rate=2000M", memory_bytes=48 * MIB)
    limits = Limits(downtime_s=3)  # it is slow while the other end still starts
    result = migrate_live(host, target, limits=limits, report=events.append)
    assert oracle.found.different == ()
    (first,) = [event for event in events if isinstance(event, Round)]
    assert first.skipped_pages > 3000
    assert "would not halve" in next(e.reason for e in events if isinstance(e, Decided))
    # The 4096 twice would be 16384; of the round's first 1024 none are left out.
    assert result.nr_pages < (48 + 8) * MIB >> 12
    moved(host, target)


def test_what_is_left_out_gives_the_guest_no_less_time(host, target):
    """Rounds that leave out nearly everything last as long as if they sent it."""
    if host.info()["dirty_log"] != USERFAULTFD:
        pytest.skip("this kernel cannot log writes by write protection")
    events, at = [], []

    def report(event):
        if isinstance(event, Round):
            events.append(event)
            at.append(time.monotonic())

    start(host, cmdline="write=8M rate=2000M")
    limits = Limits(downtime_s=1e-6, max_rounds=3)
    migrate_live(host, target, limits=limits, bandwidth=16 * MIB, report=report)
    second, third = events[1:]
    left_out_s = second.skipped_pages * 4096 / second.bandwidth
    assert left_out_s > 0.05
    assert at[2] - at[1] > 0.8 * left_out_s + third.seconds
    assert second.nr_bytes >= 4 * MIB  # of which none are left out: they measure the bandwidth
    moved(host, target)


def test_auto_converge(host, target):
    """A guest that outruns the wire is throttled, more and more, and at the target no more."""
    events = []
    start(host, cmdline="write=2M rate=50M")
    limits = Limits(downtime_s=0.05, auto_converge=True, max_rounds=6)
    migrate_live(host, target, limits=limits, bandwidth=8 * MIB, report=events.append)
    throttles = [e.throttle_percent for e in events if isinstance(e, Decided)]
    assert max(throttles) >= 20
    assert throttles == sorted(throttles)
    moved(host, target)


def test_a_migration_that_is_cancelled(host, target, kind):
    """The guest writes too much and may not be stopped for it: it goes on here, unthrottled, its
    writes are not logged any more, and nothing is left there."""
    start(host)
    limits = Limits(downtime_s=1e-6, timeout_s=0.5, on_timeout=CANCEL, auto_converge=True)
    with pytest.raises(MigrationCancelled, match=r"0\.5 s are over"):
        migrate_live(host, target, limits=limits, dirty_log=kind)
    assert state(host) == "running"
    nothing_is_left(target)
    with host.find("g") as domctl:
        domctl.log_dirty()
    runs_on(host)
    migrate_live(host, target)
    moved(host, target)


def test_two_migrations_at_a_time(host, target):
    """The second one is refused, and the first is none the worse."""
    refused = []
    start(host)

    def second(event):
        if isinstance(event, Round) and event.number == 2:
            with pytest.raises(GuestStateError, match="another migration"):
                migrate_live(host, target)
            refused.append(event)

    migrate_live(host, target, report=second)
    assert refused
    moved(host, target)


def test_not_live(host, target, monkeypatch):
    """Without rounds it is one copy of a suspended guest, as a save is."""
    oracle = Oracle(monkeypatch, target)
    start(host)
    result = migrate_live(host, target, live=False)
    assert (result.nr_rounds, result.dirty_log) == (0, None)
    assert result.nr_pages == 4096
    assert oracle.found.different == ()
    moved(host, target)


def slept_ns(text):
    """Return the guest's wall clock less its own time, by the last CLOCK line."""
    now, wall = text.split("CLOCK ")[-1].split()[:2]
    return int(wall) - int(now)


def test_the_downtime_of_the_guest_is_its_clocks(host, target):
    """guest_downtime_ns is what the guest itself finds: its wall clock goes on while its own
    time stands still, by that much."""
    start(host, cmdline="clock=1")
    before = slept_ns(wait_for(lambda: "CLOCK" in (text := console(host)) and text))
    result = migrate_live(host, target, limits=Limits())
    after = slept_ns(wait_for(lambda: "CLOCK" in (text := console(target)) and text))
    assert 0 < result.guest_downtime_ns < result.downtime_ns + 20_000_000
    # What it does between its last look at the clock and the hypercall is its own.
    assert 0 <= after - before - result.guest_downtime_ns < 100_000_000


def test_a_heartbeat_notices(host, target):
    """heartbeat= tells the longest gap between two beats: the downtime is in it, and in none of
    those before and after."""

    def beats(where):
        return [int(part.split()[0]) for part in console(where).split("HEARTBEAT ")[1:]]

    start(host, cmdline="heartbeat=20 threads=0")
    wait_for(lambda: len(beats(host)) > 1)
    assert 20_000 <= min(beats(host)) < 300_000
    result = migrate_live(host, target, live=False)
    downtime_us = result.guest_downtime_ns / 1000
    wait_for(lambda: len(beats(target)) > 2)
    assert beats(target)[0] > downtime_us
    assert min(beats(target)[1:]) < downtime_us + 20_000


def test_there_and_back(host, target):
    """Three times between two hosts while it writes: it misses no tick and loses no write."""
    start(host)
    for _ in range(3):
        migrate_live(host, target, limits=ROUNDS)
        host, target = target, host
        runs_on(host)
    moved(target, host)


def test_a_linux(host, target, micro_linux, kind, monkeypatch):
    """A Linux of two vCPUs that was not made for this: the same, page by page, and it goes on."""
    oracle = Oracle(monkeypatch, target)
    kernel, ramdisk = map(str, micro_linux)
    cmdline = "console=hvc0 rdinit=/init loglevel=4"
    options = {"kernel": kernel, "ramdisk": ramdisk, "memory_bytes": 32 * MIB, "vcpus": 2}
    create(host, cmdline=cmdline, **options)
    wait_for(lambda: "TICK 2 " in console(host), 60)
    result = migrate_live(host, target, dirty_log=kind)
    assert oracle.found.different == ()
    assert result.nr_rounds > 1
    assert state(host) is None
    last = console(target)
    wait_for(lambda: console(target).count("TICK") > last.count("TICK") + 1, 60)
    nothing_is_left(host)
