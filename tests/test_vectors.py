"""vectors: what the kernel is told to write is what the buffers hold, from any byte on."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave.host.sink import vectors
from xsave.image.buffers import Rows
from xsave.vectors import behind, write_vectors

FRAMES = np.random.default_rng(3).integers(0, 256, (50, 64), np.uint8)

parts = st.lists(
    st.one_of(
        st.binary(max_size=50),
        st.binary(max_size=50).map(memoryview),
        st.lists(st.integers(0, 49), max_size=9).map(
            lambda rows: Rows(FRAMES, np.array(rows, np.uint64))
        ),
    ),
    max_size=9,
)


def content(buffers):
    return b"".join(bytes(b.gather() if isinstance(b, Rows) else b) for b in buffers)


@given(parts, st.data())
def test_any_remainder(tmp_path_factory, buffers, data):
    """What is left behind any number of bytes is the rest of the content, and nothing is empty."""
    whole = content(buffers)
    written = data.draw(st.integers(0, len(whole)))
    left = behind(vectors(buffers), written)
    assert (left[:, 1] > 0).all()
    path = tmp_path_factory.getbasetemp() / "vectors"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        assert not len(left) or write_vectors(fd, left, 7) == len(whole) - written
        assert os.pread(fd, 1 << 20, 7) == whole[written:]
    finally:
        os.close(fd)


def test_errors_are_os_errors():
    """What the kernel refuses is an OSError of the right kind."""
    some = vectors([b"x" * 100_000])
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_vectors(-1, some)
    read_fd, write_fd = os.pipe()
    try:
        os.set_blocking(write_fd, False)
        assert 0 < write_vectors(write_fd, some) < 100_000
        with pytest.raises(BlockingIOError):
            write_vectors(write_fd, some)
        with pytest.raises(OSError, match="Illegal seek") as found:
            write_vectors(write_fd, some, 0)
        assert found.value.errno == errno.ESPIPE
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_other_threads_run_meanwhile():
    """A write that blocks does not hold up the interpreter."""
    read_fd, write_fd = os.pipe()
    some = vectors([bytes(1 << 20)])
    writer = threading.Thread(target=write_vectors, args=(write_fd, some))
    writer.start()
    taken = 0
    while taken < 1 << 20:
        taken += len(os.read(read_fd, 1 << 16))
    writer.join(10)
    assert not writer.is_alive()
    os.close(read_fd)
    os.close(write_fd)
