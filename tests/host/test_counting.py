"""What gets to another host in a second, tried."""

from __future__ import annotations

import os
import threading
import time

import pytest

from xsave.errors import ConnectionLost, StorageError
from xsave.host import counting, handshake
from xsave.host.transport import Channel


@pytest.fixture
def wire():
    """Two pipes: (what we write to, what the far end reads, what it writes to, what we read)."""
    (far_in, ours_out), (ours_in, far_out) = os.pipe(), os.pipe()
    fds = [ours_out, far_in, far_out, ours_in]
    yield fds
    for fd in fds:
        if fd is not None:
            os.close(fd)


def far_end(wire, act):
    """Run it in a thread, on its ends of the pipes; they are closed behind it."""

    def run():
        act(wire[1], wire[2])
        os.close(wire[1])
        os.close(wire[2])
        wire[1] = wire[2] = None

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def measured(wire):
    channel = Channel([wire[0]], None, None)
    try:
        return counting.measure(channel, wire[3])
    finally:
        channel.close()


def test_all_of_it_is_counted(wire):
    """The far end greets, counts, and is through when nothing more comes."""
    thread = far_end(wire, counting.count)
    assert handshake.receive_line(wire[3], "greeting", 20) == counting.COUNTING
    assert measured(wire) > 1 << 20
    os.close(wire[0])
    wire[0] = None
    thread.join(20)
    assert not thread.is_alive()


def test_it_is_what_arrives_that_counts(wire):
    """Not what the pipe has room for: of a far end that takes 2 MiB a second no more is said."""
    rate = 2 << 20

    def slowly(incoming, outgoing):
        while data := os.read(incoming, counting.PIECE_BYTES):
            time.sleep(len(data) / rate)
            slowly.so_far += len(data)
            os.write(outgoing, b"+" * (slowly.so_far // counting.PIECE_BYTES))
            slowly.so_far %= counting.PIECE_BYTES

    slowly.so_far = 0
    thread = far_end(wire, slowly)
    assert rate / 20 < measured(wire) <= rate
    os.close(wire[0])
    wire[0] = None
    thread.join(20)


def test_who_sends_nothing_is_not_waited_for(wire, monkeypatch):
    """There may be others."""
    monkeypatch.setattr(counting, "_SILENCE_S", 0.05)
    with pytest.raises(ConnectionLost, match="has sent nothing"):
        counting.count(wire[1], wire[2])


def test_the_far_end_goes(wire):
    """An error, whatever was counted until then."""
    thread = far_end(wire, lambda incoming, outgoing: os.read(incoming, 1000))
    with pytest.raises(StorageError):
        measured(wire)
    thread.join(20)
