"""A stream over several connections is the stream."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsave.commands import migration
from xsave.errors import ConnectionLost, StorageError, UsageError
from xsave.host import striping
from xsave.host.sink import DescriptorSink
from xsave.host.striping import Gathering, Part, StripedSource, StripingSink, join
from xsave.image.buffers import Rows, Zeros


class Pipes:
    """So many pipes, written in turn by `sink`, read by `source`."""

    def __init__(self, count):
        ends = [os.pipe() for _ in range(count)]
        self.sink = StripingSink([DescriptorSink(writing, "a pipe") for _, writing in ends])
        self.reading = [reading for reading, _ in ends]
        self.source = StripedSource(self.reading, "pipes")

    def carry(self, writes):
        """Write all, and return what arrives."""

        def write():
            for buffers in writes:
                self.sink.write(buffers)
            self.sink.abort()

        thread = threading.Thread(target=write)
        thread.start()
        found = b""
        while piece := bytes(self.source.read(1000)):
            found += piece
        thread.join()
        self.source.close()
        return found


@settings(max_examples=40)
@given(
    st.integers(2, 5),
    st.lists(st.lists(st.one_of(st.binary(max_size=300), st.integers(0, 600_000)), max_size=5)),
)
def test_what_is_joined_is_what_was_cut(count, writes):
    """Whatever was written together, in whatever sizes; and what left is counted."""
    pipes = Pipes(count)
    given_ = [[Zeros(b) if isinstance(b, int) else b for b in buffers] for buffers in writes]
    expected = b"".join(bytes(b) if isinstance(b, int) else b for part in writes for b in part)
    assert pipes.carry(given_) == expected
    assert pipes.sink.position >= len(expected)


def test_rows_of_memory():
    """A guest's frames go straight from where they lie."""
    memory = np.random.default_rng(1).integers(0, 256, (500, 4096), np.uint8)
    index = np.arange(499, -1, -3)
    assert Pipes(3).carry([[b"head", Rows(memory, index)]]) == b"head" + memory[index].tobytes()


def test_every_connection_carries_some():
    """Pieces take turns."""
    ends = [os.pipe() for _ in range(3)]
    sinks = [DescriptorSink(writing, "a pipe") for _, writing in ends]
    sink = StripingSink(sinks)
    for _ in range(30):
        sink.write([bytes(100)])
    assert [one.position for one in sinks] == [1040] * 3
    sink.abort()
    for reading, _ in ends:
        os.close(reading)


@pytest.mark.parametrize("length", [0, (256 << 10) + 1, 0xFFFFFFFF])
def test_a_length_that_lies(length):
    """Refused before memory is taken for it."""
    pipes = Pipes(2)
    sinks = pipes.sink._sinks
    sinks[0].write([length.to_bytes(4, "little"), b"x"])
    with pytest.raises(StorageError, match=f"a piece of {length} bytes"):
        pipes.source.read(1)
    pipes.sink.abort()
    pipes.source.close()


@pytest.mark.parametrize(
    "text", ["", "x", "0123456789abcdef/2/2", "0123456789abcdef/0/17", "a/0/2"]
)
def test_parts_that_are_none(text):
    with pytest.raises(UsageError):
        Part.parse(text)


def test_gathering(tmp_path):
    """Number 0 gets what the others give, in order, wherever the directory is; they stay until it
    lets them go."""
    deep = tmp_path / ("deep" * 50)
    deep.mkdir()
    parts = Part.of(3)
    assert [Part.parse(str(part)) for part in parts] == parts
    ends = [os.pipe() for _ in parts]
    threads = [
        threading.Thread(target=join, args=(deep, part, ends[part.number][0]))
        for part in (parts[2], parts[1])
    ]
    for thread in threads:
        thread.start()
    gathered = Gathering(deep, parts[0])
    for number in (1, 2):
        os.write(ends[number][1], b"%d" % number)
    assert [os.read(fd, 10) for fd in gathered.fds] == [b"1", b"2"]
    assert list(deep.iterdir()) == []
    assert all(thread.is_alive() for thread in threads)
    gathered.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    for fd in [*gathered.fds, *(end for pair in ends for end in pair)]:
        os.close(fd)


def test_one_that_does_not_come(tmp_path, monkeypatch):
    """Neither end waits for ever."""
    monkeypatch.setattr(striping, "GATHER_TIMEOUT_S", 0.2)
    parts = Part.of(2)
    with pytest.raises(ConnectionLost, match="only 1 of 2 connections"):
        Gathering(tmp_path, parts[0])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConnectionLost, match="connection 1: nobody waits"):
        join(tmp_path, parts[1], 0)


def test_the_command_knows_how_many():
    """What the command line says without importing this."""
    assert migration.MAX_CONNECTIONS == striping.MAX_CONNECTIONS
