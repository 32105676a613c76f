"""The clocks over a suspend: the monotonic one goes on where it stopped, the wall clock is right.

Mirrors "xen: maintain clock offset over save/restore". `clock=1` on the command line has the
guest show both clocks, in ns, behind every tick: `CLOCK monotonic wall`. The hosts' clocks are
made up: domain processes are forks of this one, with other clocks.
"""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from tests.flows.flow import console, destroy, restore
from tests.flows.forked import Forks
from tests.flows.series import boot, goes_on, save_said, suspended, ticked
from xsave.guest.xen.time import NS_PER_S, VIRTUAL_EPOCH_S, VirtualClock
from xsave.host import building
from xsave.host.host import add_host
from xsave.host.suspension import Suspension
from xsave.public import SHUTDOWN_SUSPEND

EPOCH = VIRTUAL_EPOCH_S * NS_PER_S
HOUR = 3600 * NS_PER_S
DAY = 24 * HOUR
#: A tick comes on the second; printing it and being preempted take their time.
LATE = NS_PER_S // 4


class OtherHost(VirtualClock):
    """A host whose system time and TSC are no continuation of the image's: `starts_at`, `rate`;
    its wall clock is at `wall` when the domain is made."""

    starts_at, rate, wall = 0, 1_000_000, EPOCH

    def __init__(self, origin_ns=0, khz=0):
        super().__init__(self.starts_at, self.rate)

    def wallclock_ns(self):
        return self.wall - self.starts_at


def other_host(**attributes):
    """Return a class of clocks."""
    return type("Clock", (OtherHost,), attributes)


@pytest.fixture
def forks(xsave_home, monkeypatch):
    """Domain processes that see what the test patched."""
    made = Forks(monkeypatch)
    yield made
    made.kill()


@pytest.fixture
def host(forks):
    return add_host("a", 64 << 20, seed=9)


def clocks(text):
    """Return [(monotonic, wall), ...] of the CLOCK lines."""
    return [(int(a), int(b)) for a, b in re.findall(r"^CLOCK (\d+) (\d+)\r?\n", text, re.M)]


def steady(times):
    """Assert that the guest's seconds are a second each: none is missing, none lasts."""
    steps = [b - a for a, b in pairwise(times)]
    assert steps
    assert all(NS_PER_S - LATE < step < NS_PER_S + LATE for step in steps), steps


HOSTS = {
    "one just booted": {"starts_at": 0, "wall": EPOCH + DAY},
    "up for a year": {"starts_at": 366 * DAY, "wall": EPOCH + 2 * DAY},
    "another TSC": {"starts_at": 5 * HOUR, "rate": 2_893_202, "wall": EPOCH + 30 * DAY},
    "a slow TSC": {"starts_at": HOUR, "rate": 750_000, "wall": EPOCH + 30 * DAY + 1},
    "days earlier": {"starts_at": DAY, "wall": EPOCH - 3 * DAY},
}


@pytest.mark.parametrize("name", HOSTS)
def test_a_restore_elsewhere_days_later(host, tmp_path, monkeypatch, name):
    """Whatever the new host's system time, TSC and date are: the monotonic clock goes on from
    second to second as if nothing had been, and the wall clock is the new host's."""
    boot(host, cmdline="clock=1")
    before = save_said(host, tmp_path / "img")
    monkeypatch.setattr(building, "VirtualClock", other_host(**HOSTS[name]))
    restore(host, tmp_path / "img")
    text = goes_on(host, before, nr_ticks=3)
    old, new = clocks(before), clocks(text)
    steady([mono for mono, _ in old + new])
    since_resume = new[0][0] - old[-1][0]
    assert 0 < new[0][1] - HOSTS[name]["wall"] < since_resume + LATE
    steady([wall for _, wall in new])


def test_there_and_back_again(host, tmp_path, monkeypatch):
    """Three hosts in a row, each with an earlier system time than the one before: the monotonic
    clock never goes back."""
    said = boot(host, cmdline="clock=1")
    text = ""
    for starts_at in (90 * DAY, DAY, 0):
        said = save_said(host, tmp_path / "img")
        text += said
        monkeypatch.setattr(building, "VirtualClock", other_host(starts_at=starts_at))
        restore(host, tmp_path / "img")
        ticked(host, 2)
    text += console(host)
    steady([mono for mono, _ in clocks(text)])
    assert "CHECK FAILED" not in text
    destroy(host)


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "cancelled"])
def test_a_suspend_that_ends_here(host, tmp_path, monkeypatch, checkpoint):
    """An hour suspended, then the guest goes on in place: its monotonic clock leaves the hour
    out, its wall clock has it."""
    resume = Suspension.resume

    def late(self):
        if self._domain.shutdown_reason == SHUTDOWN_SUSPEND:
            self._domain.clock._now += HOUR
        resume(self)

    monkeypatch.setattr(Suspension, "resume", late)
    boot(host, cmdline="clock=1")
    if checkpoint:
        before = save_said(host, tmp_path / "img", leave="running")
    else:
        with suspended(host) as domctl:
            before = domctl.console_log().decode()
    text = ticked(host, len(clocks(before)) + 3)
    old, new = clocks(before), clocks(text)[len(clocks(before)) :]
    steady([mono for mono, _ in old + new])
    assert {wall - mono for mono, wall in old} == {old[0][1] - old[0][0]}
    (late_by,) = {wall - mono for mono, wall in new}
    assert 0 <= late_by - (old[0][1] - old[0][0]) - HOUR < LATE
    assert "RESUME cancelled" in text
    assert "CHECK FAILED" not in text
