"""What becomes of a guest: suspended and back, paused, powered off, crashed, deaf."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from tests.flows import kernels
from tests.flows.flow import (
    MEMORY,
    MIB,
    console,
    create,
    destroy,
    nothing_is_left,
    restore,
    save,
    state,
    ticks,
    wait_for,
    wait_for_tick,
)
from xsave.errors import GuestStateError, SuspendFailed
from xsave.host.host import add_host
from xsave.migrate import migrate


def create_kernel(host, tmp_path, kernel, name="g"):
    """Create a domain that runs one of the tiny kernels."""
    path = tmp_path / "kernel"
    path.write_bytes(kernel)
    create(host, name, kernel=str(path))


def without_gap(text):
    """Assert that the ticks count up by one and the guest's checks found nothing."""
    numbers = ticks(text)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert "CHECK FAILED" not in text


# ---- saved and left where it is


def test_a_checkpoint(host, tmp_path):
    """`save -c`: the guest learns that its suspend was cancelled and ticks on; its image, taken
    in passing, is a guest that learns it is new, and counts from the same tick."""
    create(host)
    wait_for_tick(host)
    save(host, tmp_path / "img", leave="running")
    assert state(host) == "running"
    before, _, after = wait_for_tick(host, after=1).partition("RESUME cancelled\n")
    assert before.endswith("SUSPEND\n")
    assert ticks(after)[0] == ticks(before)[-1] + 1
    restore(host, tmp_path / "img", name="copy")
    copy = wait_for_tick(host, "copy")
    assert "RESUME new\n" in copy
    assert "cancelled" not in copy
    assert ticks(copy)[0] == ticks(before)[-1] + 1
    without_gap(console(host))


def test_many_checkpoints(host, tmp_path):
    """Eight checkpoints in a row; then the last image is restored: no tick missing anywhere."""
    create(host)
    wait_for_tick(host)
    for _ in range(8):
        save(host, tmp_path / "img", leave="running")
    text = wait_for_tick(host, after=max(ticks(console(host))))
    assert text.count("SUSPEND\n") == text.count("RESUME cancelled\n") == 8
    without_gap(text)
    destroy(host)
    restore(host, tmp_path / "img")
    without_gap(wait_for_tick(host))


def test_left_paused(host, tmp_path):
    """`save -p`: nothing runs until it is unpaused; then the suspend was cancelled."""
    create(host)
    wait_for_tick(host)
    save(host, tmp_path / "img", leave="paused")
    assert state(host) == "paused"
    silent = console(host)
    assert silent.endswith("SUSPEND\n")
    time.sleep(0.3)
    assert console(host) == silent
    with host.find("g") as domctl:
        domctl.unpause()
    text = wait_for_tick(host, after=max(ticks(silent)))
    assert "RESUME cancelled\n" in text
    without_gap(text)


# ---- paused


def test_pause_and_unpause(host):
    """A paused guest does nothing; afterwards it goes on without a gap, however often."""
    create(host)
    wait_for_tick(host)
    for _ in range(5):
        with host.find("g") as domctl:
            domctl.pause()
            silent = console(host)
            assert state(host) == "paused"
            time.sleep(0.1)
            assert console(host) == silent
            domctl.unpause()
    without_gap(wait_for_tick(host, after=max(ticks(console(host)))))


def test_a_paused_guest_cannot_be_saved(xsave, host, tmp_path, monkeypatch):
    """It could not answer: 6 at once, not after the time-out, with what to do; it stays paused,
    there is no image; unpaused, it can be saved."""
    monkeypatch.setenv("XSAVE_SUSPEND_TIMEOUT", "1000")
    create(host)
    wait_for_tick(host)
    xsave.ok("--host", "a", "pause", "g")
    result = xsave("--host", "a", "save", "g", tmp_path / "img", timeout=60)
    assert result.code == 6
    assert "unpause" in result.err
    assert state(host) == "paused"
    assert list(tmp_path.iterdir()) == []
    xsave.ok("--host", "a", "unpause", "g")
    save(host, tmp_path / "img")
    nothing_is_left(host)


def test_paused_before_it_ever_ran(host, tmp_path):
    """Created with --paused: there is no kernel to ask, and no image of it to write again."""
    create(host, paused=True)
    with pytest.raises(SuspendFailed, match="unpause"):
        save(host, tmp_path / "img")
    assert state(host) == "paused"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("delay_ms", [0, 3])
def test_paused_while_it_suspends(host, tmp_path, monkeypatch, delay_ms):
    """A pause that comes in the middle: the save ends well or late, in one error; unpaused, the
    guest goes on."""
    monkeypatch.setenv("XSAVE_SUSPEND_TIMEOUT", "0.2")
    create(host)
    seen = max(ticks(wait_for_tick(host)))
    outcome = []

    def run():
        try:
            outcome.append(save(host, tmp_path / "img", leave="running"))
        except SuspendFailed as error:
            outcome.append(error)

    with host.find("g") as domctl:
        saver = threading.Thread(target=run)
        saver.start()
        time.sleep(delay_ms / 1000)
        domctl.pause()
        saver.join()
        assert outcome
        assert (tmp_path / "img").exists() != isinstance(outcome[0], SuspendFailed)
        domctl.unpause()
    without_gap(wait_for_tick(host, after=seen))
    assert state(host) == "running"


# ---- at its end


def test_poweroff(host):
    """Asked to power off, the guest does: the domain is gone and nothing of it is left."""
    create(host)
    wait_for_tick(host)
    with host.find("g") as domctl:
        domctl.shutdown("poweroff")
    wait_for(lambda: state(host) is None)
    nothing_is_left(host)


def test_a_crash_can_be_looked_at(xsave, host, tmp_path):
    """One flipped bit in the memory a guest watches: it says so and crashes. The domain stays,
    with its console, for whoever wants to know; it can be neither saved nor unpaused, only
    destroyed."""
    create(host)
    wait_for_tick(host)
    with host.find("g") as domctl:
        mfns = np.flatnonzero(host.machine.owner == domctl.domid)
        last = mfns[host.machine.m2p[mfns] == (MEMORY >> 12) - 1]
        host.machine.pages[last, 1000] ^= 0x10
        wait_for(lambda: state(host) == "crashed")
        with pytest.raises(GuestStateError, match="crash"):
            domctl.unpause()
    assert "CHECK FAILED" in xsave.ok("--host", "a", "console", "g", "--log").out.decode()
    result = xsave("--host", "a", "save", "g", tmp_path / "img")
    assert result.code == 6
    assert "crash" in result.err
    assert list(tmp_path.iterdir()) == []
    destroy(host)
    nothing_is_left(host)


def test_a_kernel_that_crashes_at_once(host, tmp_path):
    """An exception that nobody handles is the guest's crash, told on its console, not ours."""
    create_kernel(host, tmp_path, kernels.CRASHING)
    wait_for(lambda: state(host) == "crashed")
    assert "exception 6" in console(host)
    destroy(host)
    nothing_is_left(host)


# ---- deaf


@pytest.mark.parametrize("kernel", [kernels.SPINNING, kernels.SLEEPING], ids=["spins", "sleeps"])
def test_a_guest_that_does_not_answer(xsave, host, tmp_path, monkeypatch, kernel):
    """Busy for ever without a hypercall, or asleep for ever: a save ends with an error that says
    what did not happen; the guest is as before, can be paused, unpaused and destroyed."""
    monkeypatch.setenv("XSAVE_SUSPEND_TIMEOUT", "0.3")
    create_kernel(host, tmp_path, kernel)
    result = xsave("--host", "a", "save", "g", tmp_path / "img", timeout=60)
    assert result.code == 6
    assert "did not acknowledge" in result.err
    assert not (tmp_path / "img").exists()
    assert state(host) == "running"
    with host.find("g") as domctl:
        domctl.pause()
        assert state(host) == "paused"
        domctl.unpause()
    destroy(host)
    nothing_is_left(host)


def test_a_guest_that_is_late(xsave_home, tmp_path, monkeypatch):
    """Time-outs that end before, while and after the guest suspends: each save gives an image or
    an error, never both; every guest goes on, also where its suspend came too late."""
    host = add_host("a", 128 * MIB, seed=2)
    timeouts = ["0.00001", "0.001", "0.002", "0.004", "0.008"]
    for timeout in timeouts:
        monkeypatch.setenv("XSAVE_SUSPEND_TIMEOUT", timeout)
        create(host, f"g{timeout}")
    failed = 0
    for timeout in timeouts:
        name = f"g{timeout}"
        wait_for_tick(host, name)
        try:
            save(host, tmp_path / name, name, leave="running")
        except SuspendFailed:
            failed += 1
            assert not (tmp_path / name).exists()
        else:
            assert (tmp_path / name).exists()
    assert failed
    for timeout in timeouts:
        name = f"g{timeout}"
        without_gap(wait_for_tick(host, name, after=1))
        assert state(host, name) == "running"
        assert console(host, name).count("SUSPEND\n") == console(host, name).count("RESUME ")


def test_two_saves_at_a_time(host, tmp_path):
    """The second is refused at once and harms neither the first nor the guest."""
    create(host)
    wait_for_tick(host)

    def second_save():
        with pytest.raises(SuspendFailed, match="at work"):
            save(host, tmp_path / "second")

    with host.find("g") as domctl:
        domctl.suspend(lambda stage: None)
        second_save()
        with host.find("g") as other:
            for wake in (other.unpause, other.resume):
                with pytest.raises(GuestStateError, match="at work"):
                    wake()
        domctl.resume()
    assert list(tmp_path.iterdir()) == []
    without_gap(wait_for_tick(host, after=max(ticks(console(host)))))
    save(host, tmp_path / "first")
    nothing_is_left(host)


def test_what_is_asked_behind_a_suspend(host):
    """Is answered when the guest is suspended, or cannot be; others are answered at once."""
    create(host)
    wait_for_tick(host)
    with host.find("g") as domctl, host.find("g") as other:
        wait = domctl.ask_suspend()
        info, vcpus = domctl._post("info"), domctl.ask_vcpus()
        assert other.info().state in ("running", "suspended")
        wait(lambda stage: None)
        assert info.wait()[0]["state"] == "suspended"
        assert vcpus() == domctl.vcpus()
        domctl.resume()
        domctl.pause()
        wait, info = domctl.ask_suspend(), domctl._post("info")
        with pytest.raises(SuspendFailed, match="paused"):
            wait(lambda stage: None)
        assert info.wait()[0]["state"] == "paused"
        domctl.unpause()
        domctl.ask_suspend()
        domctl._post("info")
    without_gap(wait_for_tick(host, after=max(ticks(console(host)))))
    assert state(host) == "running"


def test_a_guest_of_an_undecided_migration(host, tmp_path):
    """Held, it stays suspended when the migration is gone, as another copy may be running:
    neither a save nor a migration that fails on it wakes it, only an explicit word."""
    create(host)
    wait_for_tick(host)
    with host.find("g") as domctl:
        domctl.suspend(lambda stage: None)
        domctl.hold()
    with pytest.raises(SuspendFailed, match="undecided"):
        save(host, tmp_path / "img")
    assert state(host) == "suspended"
    with host.find("g") as domctl, pytest.raises(SuspendFailed, match="undecided"):
        migrate(domctl, add_host("b", 64 * MIB))
    assert state(host) == "suspended"
    assert list(tmp_path.iterdir()) == []
    with host.find("g") as domctl:
        domctl.unpause()
    text = wait_for_tick(host, after=max(ticks(console(host))))
    assert "RESUME cancelled\n" in text
    without_gap(text)
