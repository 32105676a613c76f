"""The freezer: who is frozen, in which order, and what becomes of a thread that will not be."""

from __future__ import annotations

import re
import time

import pytest

from tests.flows.flow import (
    console,
    create,
    destroy,
    nothing_is_left,
    restore,
    runs_on,
    save,
    state,
    wait_for_tick,
)
from xsave.errors import SuspendFailed

LINE = re.compile(
    r"Freezing of tasks failed after (\d+)\.\d{3} seconds \((\d+) tasks refusing to freeze\): (.*)"
)


def refused(host, image):
    """Save a guest that does not freeze; return the error's text, which came at once."""
    start = time.monotonic()
    with pytest.raises(SuspendFailed) as failed:
        save(host, image)
    assert time.monotonic() - start < 20  # not the toolstack's time-out
    assert not image.exists()
    return str(failed.value)


def test_a_thread_that_will_not_freeze(host, tmp_path):
    """The save fails with an error that names the thread, as the kernel's own line does; the guest
    runs on, every thread of it; the thread gives in, and the next save works."""
    create(host, cmdline="stubborn=2 freeze_timeout=1")
    wait_for_tick(host)
    assert LINE.search(refused(host, tmp_path / "img")).groups() == ("1", "1", "stubborn")
    assert LINE.search(console(host)).groups()[2].strip() == "stubborn"
    assert state(host) == "running"
    runs_on(host)
    save(host, tmp_path / "img")
    restore(host, tmp_path / "img")
    runs_on(host)
    destroy(host)
    nothing_is_left(host)


def test_it_may_refuse_again(host, tmp_path):
    """The second request is answered by a second try, not by what the first one left behind."""
    create(host, cmdline="stubborn=1 freeze_timeout=1", vcpus=2)
    for number in (1, 2):
        assert "stubborn" in refused(host, tmp_path / "img")
        assert console(host).count("SUSPEND failed") == number
    runs_on(host)
    destroy(host)


def test_without_the_freezer_nobody_is_asked(host, tmp_path):
    """freezer=off: the same thread is stopped where it is, and the save works."""
    create(host, cmdline="freezer=off stubborn=1")
    wait_for_tick(host)
    save(host, tmp_path / "img")
    restore(host, tmp_path / "img")
    runs_on(host)
    destroy(host)


@pytest.mark.parametrize("preempt", ["voluntary", "none"])
def test_the_freezer_works_without_preemption(host, tmp_path, preempt):
    """Threads come to the refrigerator by themselves, on two CPUs."""
    create(host, cmdline=f"preempt={preempt}", vcpus=2)
    wait_for_tick(host)
    save(host, tmp_path / "img")
    restore(host, tmp_path / "img")
    runs_on(host)
    destroy(host)
