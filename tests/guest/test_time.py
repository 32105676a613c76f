"""Clocks: they never go back, stand still until started, and a guest reads the same of them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave.guest.xen import time as xen_time
from xsave.guest.xen.time import NS_PER_S, RealClock, VirtualClock, scale

origins = st.integers(0, 1 << 62)


@pytest.fixture
def host_time(monkeypatch):
    """The host's clocks, to be set by hand: `host_time["monotonic"] = ns`."""
    now = {"monotonic": 1_000, "wall": 1_700_000_000 * NS_PER_S}
    monkeypatch.setattr(xen_time.time, "monotonic_ns", lambda: now["monotonic"])
    monkeypatch.setattr(xen_time.time, "time_ns", lambda: now["wall"])
    return now


def test_a_real_clock_goes_on_from_its_origin(host_time):
    """It stands at its origin until started, then follows the host's clock; a second start
    changes nothing."""
    clock = RealClock(origin_ns=77)
    host_time["monotonic"] += 500
    assert clock.now() == 77
    clock.start()
    host_time["monotonic"] += 500
    clock.start()
    assert clock.now() == 577
    clock.step()
    clock.slice()
    clock.extend()
    clock.jump(1 << 60)
    assert clock.now() == 577
    assert clock.now() < clock.horizon_ns


@given(khz=st.integers(1, 1 << 32), at=st.integers(0, 1 << 60))
def test_rdtsc_counts_at_its_frequency(khz, at):
    """rdtsc is the time in ticks of the clock's frequency."""
    clock = RealClock(origin_ns=at, khz=khz)
    assert clock.rdtsc() == at * khz // 1_000_000


def test_the_wallclock_is_that_of_system_time_zero(host_time):
    """wallclock_ns() + now() is the host's wall time, whenever it is asked."""
    clock = RealClock(origin_ns=5 * NS_PER_S)
    clock.start()
    for step in (0, 3 * NS_PER_S):
        host_time["monotonic"] += step
        host_time["wall"] += step
        assert clock.wallclock_ns() + clock.now() == host_time["wall"]
    assert clock.wallclock_ns() == 1_700_000_000 * NS_PER_S - 5 * NS_PER_S


steps = st.sampled_from(["step", "slice", "rdtsc", "now", "start", "extend", "wallclock_ns"])


@given(origins, st.lists(steps | st.tuples(st.just("jump"), st.integers(0, 1 << 63))))
def test_a_virtual_clock_is_the_guests_alone(origin, moves):
    """It never goes back, moves by what the guest does and not by the host's time, never jumps
    beyond its horizon, and two clocks with the same moves show the same."""
    clocks = [VirtualClock(origin), VirtualClock(origin)]
    before = origin
    for move in moves:
        for clock in clocks:
            if isinstance(move, tuple):
                at = clock.now()
                clock.jump(move[1])
                assert clock.now() <= max(at, clock.horizon_ns)
            else:
                getattr(clock, move)()
        assert clocks[0].now() == clocks[1].now() >= before
        assert clocks[0].horizon_ns == clocks[1].horizon_ns
        before = clocks[0].now()


def test_virtual_steps():
    """A crossing, a slice and a read of the counter move the clock; looking at it does not."""
    clock = VirtualClock(1000)
    clock.step()
    assert clock.now() == 1000 + xen_time.VIRTUAL_STEP_NS
    clock.slice()
    assert clock.now() == 1000 + xen_time.VIRTUAL_STEP_NS + xen_time.VIRTUAL_SLICE_NS
    assert clock.rdtsc() == clock.now() == 1000 + 2 * xen_time.VIRTUAL_STEP_NS + 100_000
    assert clock.wallclock_ns() == xen_time.VIRTUAL_EPOCH_S * NS_PER_S


def test_the_horizon_is_where_idleness_ends():
    """An idle guest skips to its next timer, at most to the horizon; extend() moves that on from
    where the guest is, not from where the horizon was."""
    clock = VirtualClock()
    clock.jump(NS_PER_S)
    assert clock.now() == 0
    clock.extend()
    clock.jump(NS_PER_S)
    assert clock.now() == NS_PER_S
    clock.jump(10)
    assert clock.now() == NS_PER_S
    clock.extend()
    assert clock.horizon_ns == NS_PER_S + xen_time.VIRTUAL_HORIZON_NS
    clock.jump(1 << 62)
    assert clock.now() == clock.horizon_ns


@given(st.integers(1, (1 << 32) - 1), st.integers(0, 1 << 50))
def test_the_scale_turns_ticks_into_nanoseconds(khz, ticks):
    """A guest's own sum, ((tsc << shift) * mul) >> 32, gives the time of so many ticks, within
    what a 32-bit multiplier can say; the multiplier fits 32 bits and the shift 8."""
    mul, shift = scale(khz)
    assert 0 < mul < 1 << 32
    assert -128 <= shift < 128
    delta = ticks << shift if shift >= 0 else ticks >> -shift
    exact = ticks * 1_000_000 // khz
    bound = (exact >> 30) + 2 + (2 * 1_000_000 << -shift if shift < 0 else 0) // khz
    assert abs((delta * mul >> 32) - exact) <= bound


# -- what the guest is told ---


def published(guest):
    return struct.unpack("<IIQQIbB2x", bytes(guest.vcpu.info.time))


def test_the_published_time_is_the_clocks(guest):
    """tsc_timestamp and system_time are of one instant, and a guest that reads its counter then
    computes the clock's time from them; the version is even and has moved on."""
    domain, vcpu = guest.domain, guest.vcpu
    domain.clock = VirtualClock(987_654_321, khz=2_400_000)
    versions = []
    for _ in range(3):
        domain.clock.slice()
        domain.update_time(vcpu)
        version, _, tsc, system, mul, shift, _ = published(guest)
        assert version % 2 == 0
        versions.append(version)
        assert (tsc, system) == (domain.clock.now() * 24 // 10, domain.clock.now())
        later = domain.clock.rdtsc()
        delta = later - tsc
        delta = delta << shift if shift >= 0 else delta >> -shift
        assert abs(system + (delta * mul >> 32) - domain.clock.now()) <= 2
    assert sorted(set(versions)) == versions


def test_the_published_wallclock(guest):
    """wc_sec and wc_nsec are the wall time at system_time 0, with its upper half; the version is
    even."""
    domain, shared = guest.domain, guest.domain.shared

    class Late(VirtualClock):
        def wallclock_ns(self):
            return (5 << 32 | 7) * NS_PER_S + 11

    domain.clock = Late()
    domain.update_wallclock()
    assert (shared.wc_sec, shared.wc_sec_hi, shared.wc_nsec) == (7, 5, 11)
    assert shared.wc_version == 2
    domain.update_wallclock()
    assert shared.wc_version == 4


def test_the_first_start(guest):
    """Starting a domain starts its clock, publishes time and wall clock, and counts one more TSC
    incarnation."""
    domain = guest.domain
    domain.tsc["incarnation"] = 3
    domain.start()
    assert not domain.never_run
    assert domain.tsc["incarnation"] == 4
    assert domain.shared.wc_sec == xen_time.VIRTUAL_EPOCH_S
    assert published(guest)[0] == 2


def test_due_timers_are_raised_once(guest):
    """A timer whose time has come raises VIRQ_TIMER and is gone; one in the future stays."""
    domain, vcpu = guest.domain, guest.vcpu
    domain.shared.evtchn_mask[0] = 0
    port = domain.events.bind_virq(0, 0)
    vcpu.timer_ns = 100
    domain.run_timers(99)
    assert vcpu.timer_ns == 100
    assert not domain.events.is_pending(port)
    domain.run_timers(100)
    assert vcpu.timer_ns is None
    assert domain.events.is_pending(port)
