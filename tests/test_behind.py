"""Write-behind: order, errors, and rooms that may be filled again."""

from __future__ import annotations

import threading

import pytest

from xsave.behind import WriteBehind
from xsave.errors import StorageError

DEPTH = 3


def test_everything_is_written_in_order():
    """After the block all buffers were written, in the order of the calls."""
    written = []
    with WriteBehind(written.extend, DEPTH) as write:
        for number in range(200):
            write([number, -number])
    assert written == [n for number in range(200) for n in (number, -number)]


def test_rooms_in_turn_are_never_overwritten_too_soon():
    """With depth + 1 rooms in turn, a room keeps its content until it is written."""
    rooms = [bytearray(1) for _ in range(DEPTH + 1)]
    written = []

    def write_slowly(buffers):
        threading.Event().wait(0.001)
        written.extend(bytes(b) for b in buffers)

    with WriteBehind(write_slowly, DEPTH) as write:
        for number in range(100):
            room = rooms[number % len(rooms)]
            room[0] = number
            write([room])
    assert written == [bytes([number]) for number in range(100)]


def test_a_failed_write_is_raised_and_nothing_is_written_after_it():
    """An error reaches the caller, as itself, and the stream ends where it happened."""
    written = []

    def fail_at_five(buffers):
        if buffers == [5]:
            raise StorageError("no space")
        written.extend(buffers)

    with pytest.raises(StorageError, match="no space"), WriteBehind(fail_at_five, DEPTH) as write:
        for number in range(100):
            write([number])
    assert written == [0, 1, 2, 3, 4]


def test_the_last_write_may_fail_too():
    """An error after the last call is raised by the end of the block."""

    def fail(_):
        raise StorageError("late")

    with pytest.raises(StorageError, match="late"), WriteBehind(fail, DEPTH) as write:
        write([1])


def test_an_error_of_the_caller_drops_what_waits():
    """When the block fails nothing more is written, and its own error is the one raised."""
    begin, written = threading.Event(), []

    def write_when_told(buffers):
        begin.wait()
        written.extend(buffers)

    write = WriteBehind(write_when_told, DEPTH)
    with pytest.raises(KeyboardInterrupt), write:
        for number in range(DEPTH):
            write([number])
        threading.Timer(0.05, begin.set).start()
        raise KeyboardInterrupt
    assert written == [0]
    assert not write._thread.is_alive()


def test_a_write_that_hangs_does_not_hold_up_the_caller(monkeypatch):
    """An abort leaves a write that never returns to its thread."""
    monkeypatch.setattr("xsave.behind._ABORT_WAIT_S", 0.05)
    forever = threading.Event()
    with (
        pytest.raises(KeyboardInterrupt),
        WriteBehind(lambda _: forever.wait(), DEPTH) as write,
    ):
        write([1])
        raise KeyboardInterrupt
    forever.set()
