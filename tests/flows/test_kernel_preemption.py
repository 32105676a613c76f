"""preempt=full|voluntary|none, and priorities: who gets the CPU from whom, and when."""

from __future__ import annotations

import re

import pytest

from tests.flows.flow import console, create, destroy, runs_on, save, state, ticks, wait_for

SPIN = re.compile(r"SPIN begins\r?\n(.*?)SPIN ends, (\d+) switches", re.DOTALL)


def spins(text):
    """Return (what was printed, how often the CPU was switched) of each spin that ended."""
    return [(between, int(switches)) for between, switches in SPIN.findall(text)]


@pytest.mark.parametrize("preempt", ["full", "voluntary", "none"])
def test_a_spinning_thread(host, preempt):
    """With full preemption others run while a thread spins for 50 ms without calling anything;
    with the other two nobody does, until it is through; in each case all go on afterwards."""
    create(host, deterministic=3, cmdline=f"preempt={preempt} spin=50")
    wait_for(lambda: len(spins(console(host))) >= 2)
    found = [switches for _, switches in spins(console(host))]
    if preempt == "full":
        assert min(found) > 0
    else:
        assert set(found) == {0}
    assert ticks(wait_for(lambda: 5 in ticks(console(host)) and console(host))) == [1, 2, 3, 4, 5]
    destroy(host)


def test_full_is_the_default(host):
    """Without a word on the command line a spinning thread is preempted."""
    create(host, deterministic=3, cmdline="spin=50")
    wait_for(lambda: spins(console(host)))
    assert spins(console(host))[0][1] > 0
    destroy(host)


def test_the_ticker_ticks_beside_a_spinning_thread(host):
    """For longer than a second nothing but events takes the CPU from it: ticks still come."""
    create(host, cmdline="preempt=full spin=2500")
    text = wait_for(lambda: spins(console(host)) and console(host))
    assert "TICK" in spins(text)[0][0], text
    destroy(host)


def begins_to_spin(host):
    """Wait until the spinning thread has just begun."""
    seen = console(host).count("SPIN begins")
    wait_for(lambda: console(host).count("SPIN begins") > seen)


def test_a_suspend_takes_the_cpu_from_a_spinning_thread(host, tmp_path):
    """The thread that watches for it has a higher priority: the guest is saved in mid spin."""
    create(host, cmdline="preempt=full freezer=off spin=20000")
    begins_to_spin(host)
    save(host, tmp_path / "img", leave="running")
    text = wait_for(lambda: "RESUME cancelled" in (text := console(host)) and text)
    assert "SPIN ends" not in text
    destroy(host)


@pytest.mark.parametrize("preempt", ["voluntary", "none"])
def test_without_preemption_a_suspend_waits(host, tmp_path, preempt):
    """A request in mid spin is looked at after its end, and the guest is saved then."""
    create(host, cmdline=f"preempt={preempt} freezer=off spin=500")
    for number in range(1, 3):
        begins_to_spin(host)
        save(host, tmp_path / "img", leave="running")
        text = console(host)
        assert text.count("SUSPEND") == number
        assert not any("SUSPEND" in between for between, _ in spins(text))
        last = text[text.rindex("SUSPEND") - 200 : text.rindex("SUSPEND")]
        assert last.rstrip().splitlines()[-1].startswith(("SPIN ends", "TICK"))
    runs_on(host)
    assert state(host) == "running"
    destroy(host)
