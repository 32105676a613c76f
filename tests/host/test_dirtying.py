"""The log of dirty frames: what was written is in it, whoever wrote; both kinds, one at a time."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.flows import flow
from xsave.errors import GuestStateError, UsageError
from xsave.guest.xen.logdirty import COMPARE, KINDS, USERFAULTFD
from xsave.guest.xen.writeprotect import halves, pages_within
from xsave.host.host import add_host
from xsave.host.throttle import MAX_PERCENT, PERIOD_S, Throttle

WRITER = "touch=1M write=2M rate=40M"


@pytest.fixture
def host(xsave_home):
    """A host with a guest that writes."""
    host = add_host("a", 64 * flow.MIB, seed=3)
    flow.create(host, memory_bytes=16 * flow.MIB, cmdline=WRITER)
    flow.wait_for(lambda: "TICK 1" in flow.console(host))
    return host


def kinds_here(host):
    """The kinds this machine can have."""
    return KINDS if host.info()["dirty_log"] == USERFAULTFD else [COMPARE]


@pytest.fixture(params=KINDS)
def log(request, host):
    """(domctl, log) of the guest, the log on."""
    if request.param not in kinds_here(host):
        pytest.skip("this kernel cannot log writes by write protection")
    with host.find("g") as domctl:
        yield domctl, domctl.log_dirty(request.param)


def mine(domctl):
    """Return the domain's frames."""
    return np.flatnonzero(domctl.machine.owner == domctl.domid)


def test_every_write_is_logged(log):
    """Whatever differs between two moments at which the guest stood still is in what clean()
    says at the second one; ten times over, while it writes, makes page tables, and the emulator
    sets their A and D bits. Most of the memory is not."""
    domctl, dirty = log
    frames = mine(domctl)
    domctl.pause()
    before = domctl.machine.mem[frames]  # first: what is read that never was is touched, too
    dirty.clean()
    for _ in range(10):
        domctl.unpause()
        time.sleep(0.1)
        domctl.pause()
        written = np.isin(frames, dirty.clean())
        now = domctl.machine.mem[frames]
        changed = (now != before).any(axis=1)
        assert changed.sum() > 100  # the writer alone
        assert not (changed & ~written).any()
        assert written.mean() < 0.5
        before = now


def test_what_changes_without_a_write_is_logged(log):
    """Frames that get another owner, pfn or page type while the guest makes page tables and its
    balloon takes and gives are in what clean() says, though nobody writes to most of them."""
    domctl, dirty = log
    machine, pages = domctl.machine, 16 * flow.MIB >> 12

    def known():
        every = np.arange(machine.nr_frames, dtype=np.uint64)
        return np.stack([machine.owner, machine.m2p, domctl.page_types(every)])

    domctl.pause()
    dirty.clean()
    before, changes = known(), np.zeros(3, int)
    for taken in (800, 0, 400, 900, 200, 0):
        domctl.unpause()
        domctl.set_target(pages - taken)
        time.sleep(0.3)
        domctl.pause()
        found, now = dirty.clean(), known()
        differ = before != now
        assert np.isin(np.flatnonzero(differ.any(axis=0)), found).all()
        changes += differ.sum(axis=1)
        before = now
    assert (changes > 20).all()


def test_peek_changes_nothing(log):
    """peek() sees what clean() will, twice, and clean() then leaves nothing to see."""
    domctl, dirty = log
    dirty.clean()
    time.sleep(0.1)
    domctl.pause()
    seen = dirty.peek()
    assert seen.size
    assert np.array_equal(dirty.peek(), seen)
    assert np.array_equal(dirty.clean(), seen)
    assert not dirty.peek().size


def test_pages_of_a_compared_round_are_what_is_compared_with(host):
    """The compare log's pages are copies: a page that changed and changed back after clean() is
    sent as it was then, so nothing is lost though clean() does not see it."""
    with host.find("g") as domctl:
        dirty = domctl.log_dirty(COMPARE)
        domctl.pause()
        dirty.clean()
        machine = domctl.machine
        frames = mine(domctl)
        frames = frames[machine.resident(frames)]
        assert np.array_equal(dirty.pages[frames], machine.mem[frames])
        old = machine.mem[frames[5]].copy()
        machine.mem[frames[5]] = 77
        assert np.array_equal(dirty.pages[frames[5]], old)
        machine.mem[frames[5]] = old
        assert not dirty.clean().size


def test_writes_through_another_mapping_are_marked(host):
    """This process's writes are not its domain's: they count once they were marked."""
    if USERFAULTFD not in kinds_here(host):
        pytest.skip("this kernel cannot log writes by write protection")
    with host.find("g") as domctl, host.find("g") as other:
        dirty = domctl.log_dirty(USERFAULTFD)
        domctl.pause()
        dirty.clean()
        some = mine(domctl)[10:13].astype(np.uint64)
        other.mark_dirty(some)
        assert np.array_equal(dirty.clean(), np.sort(some))
        assert not dirty.clean().size


runs_of_pages = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=8).map(
    lambda gaps: [(sum(g + n for g, n in gaps[:i]) + gap, nr) for i, (gap, nr) in enumerate(gaps)]
)


@given(runs_of_pages, runs_of_pages)
def test_pages_of_regions_within_runs(regions, runs):
    """As many sets of pages say it."""
    ends = np.array([(first, first + nr) for first, nr in regions], np.int64).reshape(-1, 2)
    written = {page for first, nr in regions for page in range(first, first + nr)}
    asked = {page for first, nr in runs for page in range(first, first + nr)}
    assert pages_within(ends, runs).tolist() == sorted(written & asked)


@given(runs_of_pages.filter(len), st.integers(0, 300))
def test_runs_in_two_halves(runs, half):
    """Together they are the runs, and the first one has so many pages, if there are as many."""
    lower, upper = halves(runs, half)
    pages = [page for first, nr in (*lower, *upper) for page in range(first, first + nr)]
    assert pages == [page for first, nr in runs for page in range(first, first + nr)]
    assert sum(nr for _, nr in lower) == min(half, len(pages))


def test_one_log_at_a_time(log, host):
    """A second one is refused until the first is off or its connection closed."""
    domctl, dirty = log
    with host.find("g") as other:
        with pytest.raises(GuestStateError, match="another migration"):
            other.log_dirty()
        with pytest.raises(GuestStateError):
            other.throttle(20)
        dirty.off()
        second = other.log_dirty()
        second.clean()
    flow.wait_for(lambda: try_log(domctl))


def try_log(domctl):
    try:
        return domctl.log_dirty()
    except GuestStateError:
        return None


def test_what_is_no_request_is_refused(host):
    """Unknown kinds, actions and percentages are usage errors; the guest runs on."""
    with host.find("g") as domctl:
        with pytest.raises(UsageError):
            domctl.log_dirty("dbits")
        domctl.log_dirty(COMPARE)
        with pytest.raises(UsageError):
            domctl.throttle(MAX_PERCENT + 1)
        with pytest.raises(UsageError):
            domctl._call("logdirty", action="paint")
    flow.runs_on(host)


def test_a_throttled_guest_writes_less(host):
    """At 90 percent the writer gets less done; off, all as before; the guest is none the worse."""
    with host.find("g") as domctl:
        dirty = domctl.log_dirty()
        dirty.clean()

        def written():
            dirty.clean()
            time.sleep(PERIOD_S / 3)  # so short that not all is dirty long before
            return dirty.clean().size

        free = max(written() for _ in range(9))
        domctl.throttle(95)
        slow = min(written() for _ in range(9))
        assert slow < free / 2
        domctl.throttle(0)
        assert max(written() for _ in range(9)) > free / 2
    flow.runs_on(host)


def test_the_duty_cycle():
    """It rests for its share of each period, at 0 never."""
    throttle = Throttle()
    assert throttle.rest_s() == 0.0
    throttle.percent = MAX_PERCENT
    rests = []
    for _ in range(40):
        rests.append(throttle.rest_s() > 0)
        time.sleep(PERIOD_S / 7)
    assert sum(rests) > 30
