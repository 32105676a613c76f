"""Behind: order, errors, bounds, and that nothing runs when it must not."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from xsave.behind import Behind
from xsave.errors import StorageError


def test_all_calls_are_made_in_order():
    """After the block every call was made, with its arguments, in the order of the calls."""
    made = []
    with Behind(lambda *arguments: made.append(arguments), 100) as call:
        for number in range(300):
            call(number % 7, number, -number)
    assert made == [(number, -number) for number in range(300)]


def test_little_waits():
    """What waits and what is under way stay within the bound; something larger goes alone."""
    held, most = [0], []

    def hold(nbytes):
        time.sleep(0.001)
        held[0] -= nbytes

    with Behind(hold, 10) as call:
        for nbytes in [4] * 30 + [25] * 3:
            call(nbytes, nbytes)
            held[0] += nbytes
            most.append(held[0])
    assert max(most[:30]) <= 10
    assert max(most) <= 25 + 4


def test_the_caller_goes_on_meanwhile():
    """A call returns before it is made, as long as there is room."""
    go, made = threading.Event(), []

    def wait(number):
        go.wait(10)
        made.append(number)

    with Behind(wait, 10) as call:
        call(1, 1)
        call(1, 2)
        assert made == []
        go.set()
    assert made == [1, 2]


def test_a_failed_call_is_raised_and_none_follows():
    """An error reaches the caller, as itself, and no call is made after it."""
    made = []

    def fail_at_five(number):
        if number == 5:
            raise StorageError("no space")
        made.append(number)

    with pytest.raises(StorageError, match="no space"), Behind(fail_at_five, 3) as call:
        for number in range(100):
            call(1, number)
    assert made == [0, 1, 2, 3, 4]


def test_the_last_call_may_fail_too():
    """An error after the last call is raised by the end of the block."""

    def fail():
        raise StorageError("late")

    with pytest.raises(StorageError, match="late"), Behind(fail, 3) as call:
        call(1)


def test_an_error_of_the_caller_drops_what_waits():
    """When the block fails the call under way is waited for and no other is made."""
    go, begun, made = threading.Event(), threading.Event(), []

    def wait(number):
        begun.set()
        go.wait(10)
        made.append(number)

    behind = Behind(wait, 10)
    with pytest.raises(KeyboardInterrupt), behind as call:
        for number in range(3):
            call(1, number)
        begun.wait(10)
        threading.Timer(0.05, go.set).start()
        raise KeyboardInterrupt
    assert made == [0]
    assert not behind._thread.is_alive()


def test_a_call_that_hangs_does_not_hold_up_the_caller():
    """abandon() with a time leaves a call that never returns to its thread."""
    begun, forever = threading.Event(), threading.Event()

    def hang():
        begun.set()
        forever.wait()

    behind = Behind(hang, 10)
    behind(1)
    begun.wait(10)
    start = time.monotonic()
    behind.abandon(0.05)
    assert time.monotonic() - start < 5
    assert behind._thread.is_alive()
    forever.set()


def test_unused_it_costs_no_thread():
    """Without a call there is no thread, and nothing to wait for."""
    nr_threads = threading.active_count()
    with Behind(print, 10):
        assert threading.active_count() == nr_threads
    Behind(print, 10).abandon()


def test_it_keeps_nobody_alive():
    """Who holds a Behind of its own method is freed as soon as nobody else holds it."""

    class Owner:
        def __init__(self):
            self.behind = Behind(self.method, 10)

        def method(self):
            pass

    owner = Owner()
    owner.behind(1)
    owner.behind.finish()
    gone = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert gone() is None
    finally:
        gc.enable()
