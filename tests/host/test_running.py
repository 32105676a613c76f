"""A domain that is complete and may not run yet: its CPU is made ready, and nothing more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from xsave.host.running import RunningDomain


class Xen:
    """A hypervisor that counts; `wrong`: the state cannot be loaded."""

    def __init__(self):
        self.powered = self.wrong = self.hands_over = False
        self.made, self.loaded, self.starts = [], [], 0
        clock = SimpleNamespace(virtual=False)
        self.domain = SimpleNamespace(
            vcpus=[0, 1], clock=clock, never_run=True, start=self.start_clocks
        )

    def start_clocks(self):
        self.starts += 1

    def make_cpu(self):
        self.made.append(object())
        return self.made[-1]

    def start_cpu(self, cpu):
        self.loaded.append(cpu)
        if self.wrong:
            raise ValueError("a selector that there is not")
        self.powered = True


@pytest.fixture
def running(tmp_path):
    made = RunningDomain(tmp_path, SimpleNamespace(directory=tmp_path), 1, "g", SimpleNamespace())
    made.hypervisor = Xen()
    return made


def test_it_gets_ready_once(running):
    """The CPU that was made in advance is loaded; no clock begins before the first run."""
    xen = running.xen
    running.warm_up()
    running.get_ready()
    running.get_ready()
    assert xen.loaded == xen.made
    assert len(xen.made) == 1
    assert xen.hands_over
    assert not xen.starts


def test_what_is_wrong_with_its_state_comes_when_it_runs(running):
    """With another CPU than the one that has got half of the state."""
    xen = running.xen
    xen.wrong = True
    running.get_ready()
    assert not xen.powered
    with pytest.raises(ValueError, match="a selector"):
        running.power_on()
    assert xen.loaded == xen.made
    assert len(xen.made) == 2
    assert xen.starts == 1


def test_memory_that_is_still_coming_is_not_waited_for(running):
    """Loading the state may look at it."""
    running.filling = SimpleNamespace(active=True)
    running.get_ready()
    assert not running.xen.made
