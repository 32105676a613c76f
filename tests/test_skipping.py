"""Skipping: what is dirty again, as the log says when it is asked, and that is not too often."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from xsave import skipping
from xsave.frames import PAGE_SIZE
from xsave.skipping import Skipping

NR_FRAMES = 32


class Log:
    """Says what is in `dirty`, which takes so many seconds of `clock`."""

    peeks = True

    def __init__(self, clock):
        self.clock, self.dirty, self.took, self.asked = clock, [], 0.0, 0

    def peek(self):
        self.asked += 1
        self.clock.now += self.took
        return np.array(self.dirty, np.int64)


@pytest.fixture
def clock(monkeypatch):
    """The time as the module sees it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(skipping, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def log(clock):
    return Log(clock)


def again(skips, *mfns):
    return skips.among(np.array(mfns, np.uint64)).tolist()


def ask_for_a_second(skips, clock):
    skips.cleaned()
    began = clock.now
    while clock.now < began + 1:
        again(skips, 1)
        clock.now += 0.001


def test_what_is_dirty_since_the_log_was_cleaned(log, clock):
    skips = Skipping(log, NR_FRAMES)
    skips.cleaned(hot=np.array([3, 4]))
    assert again(skips, 4, 5, 3, 31) == [True, False, True, False]
    log.dirty = [31]
    clock.now += 1
    assert again(skips, 4, 5, 31) == [True, False, True]
    skips.cleaned()
    assert again(skips, 4, 5, 31) == [False, False, False]
    assert again(skips) == []


def test_it_is_asked_now_and_then(log, clock):
    """At 5, 10, 20, 40, 60 ms and so on, and then not for more than a tenth of the time."""
    skips = Skipping(log, NR_FRAMES)
    ask_for_a_second(skips, clock)
    assert 48 <= log.asked <= 52
    assert [round(seconds * 200) for seconds, _ in skips.growth[:6]] == [0, 1, 2, 4, 8, 12]
    log.asked, log.took = 0, 0.01
    ask_for_a_second(skips, clock)
    assert 8 <= log.asked <= 10


def test_a_log_that_is_slow_to_ask_is_not_asked(log, clock):
    """Nor is it believed about what was dirty: it names all there is at first."""
    log.peeks = False
    skips = Skipping(log, NR_FRAMES)
    skips.cleaned(hot=np.arange(NR_FRAMES))
    clock.now += 1
    assert again(skips, 3, 4) == [False, False]
    assert not log.asked


def test_how_fast_frames_get_dirty(log, clock):
    skips = Skipping(log, NR_FRAMES)
    clock.now += 9
    skips.cleaned()
    for dirty in ([1], [1, 2, 3]):
        log.dirty = dirty
        clock.now += 0.5
        again(skips, 1)
    assert skips.growth == [(0, 0), (0.5, PAGE_SIZE), (1.0, 3 * PAGE_SIZE)]
    skips.cleaned()
    assert skips.growth == [(0, 0)]
