"""sink.py and open_sink: atomic files with holes, pipes, devices."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave.errors import StorageError
from xsave.host.channel import BrokenPipe, open_sink
from xsave.host.sink import DescriptorSink, FileSink
from xsave.image.buffers import Rows, Zeros

FRAMES = np.random.default_rng(1).integers(0, 255, (3000, 512), np.uint64)

buffers = st.lists(
    st.one_of(
        st.binary(max_size=3000),
        st.builds(Zeros, st.integers(0, 3) | st.integers(0, 40).map(lambda n: n * 4096)),
        st.integers(0, 2).map(lambda n: np.full((n, 4096), 7, np.uint8)),
        st.binary(max_size=9).map(memoryview),
        st.lists(st.integers(0, 2999), max_size=40).map(
            lambda rows: Rows(FRAMES, np.array(rows, np.uint64))
        ),
    ),
    max_size=12,
)


def as_bytes(given_buffers):
    def data(buffer):
        if isinstance(buffer, Rows):
            buffer = buffer.gather()
        return bytes(buffer.nbytes) if isinstance(buffer, Zeros) else bytes(buffer)

    return b"".join(map(data, given_buffers))


@given(buffers, st.integers(0, 12))
def test_a_file_has_the_bytes(tmp_path_factory, given_buffers, at):
    """Whatever is written, in whatever calls, is what the file holds, its end included."""
    path = tmp_path_factory.mktemp("sink") / "image"
    with open_sink(str(path)) as sink:
        sink.write(given_buffers[:at])
        sink.write(iter(given_buffers[at:]))
        sink.commit()
        assert sink.position == len(as_bytes(given_buffers))
    assert path.read_bytes() == as_bytes(given_buffers)
    assert [p.name for p in path.parent.iterdir()] == ["image"]


@given(buffers)
def test_a_pipe_has_the_bytes(given_buffers):
    """The same through a pipe, where zeros are written."""
    read_fd, write_fd = os.pipe()
    found = []

    def drain():
        with open(read_fd, "rb") as pipe:  # noqa: PTH123 - a descriptor
            found.append(pipe.read())

    thread = threading.Thread(target=drain)
    thread.start()
    with DescriptorSink(write_fd, "pipe") as sink:
        sink.write(given_buffers)
        sink.commit()
    thread.join(10)
    assert found == [as_bytes(given_buffers)]


def test_many_buffers_in_one_call(tmp_path):
    """More buffers than a system call takes are written all the same."""
    parts = [bytes([i % 251]) * (i % 7) for i in range(5000)]
    with FileSink(str(tmp_path / "x")) as sink:
        sink.write(parts)
        sink.commit()
    assert (tmp_path / "x").read_bytes() == b"".join(parts)


def test_more_rows_than_a_call_takes(tmp_path):
    """Thousands of rows of an array, in any order, come out in that order."""
    order = np.random.default_rng(2).permutation(3000).astype(np.uint64)
    with FileSink(str(tmp_path / "x")) as sink:
        sink.write([b"head", Rows(FRAMES, order), b"tail"])
        sink.commit()
    expected = b"head" + FRAMES[order.astype(np.intp)].tobytes() + b"tail"
    assert (tmp_path / "x").read_bytes() == expected


def test_zeros_are_holes(tmp_path):
    """Zeros take no blocks, also at the end."""
    path = tmp_path / "x"
    with open_sink(str(path)) as sink:
        sink.write([b"head", Zeros(64 << 20)])
        sink.commit()
    assert path.stat().st_size == 4 + (64 << 20)
    assert path.stat().st_blocks * 512 < 1 << 20


def test_nothing_under_the_name_before_commit(tmp_path):
    """Until commit the old file stands; then the new one does, mode 0600, and nothing else."""
    path = tmp_path / "image"
    path.write_bytes(b"old")
    path.chmod(0o644)
    with open_sink(str(path)) as sink:
        sink.write([b"new"])
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]
        sink.commit()
        assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_leaving_without_commit_leaves_nothing(tmp_path, error):
    """Without commit, for whatever reason, the old file stays and the temporary one goes."""
    path = tmp_path / "image"
    path.write_bytes(b"old")
    try:
        with open_sink(str(path)) as sink:
            sink.write([b"new"])
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_symbolic_link_stays_one(tmp_path):
    """What a link points to is replaced, not the link."""
    (tmp_path / "sub").mkdir()
    target, link = tmp_path / "sub" / "target", tmp_path / "link"
    link.symlink_to(target)
    for content in (b"1", b"2"):
        with open_sink(str(link)) as sink:
            sink.write([content])
            sink.commit()
        assert link.is_symlink()
        assert target.read_bytes() == content


@pytest.mark.parametrize("path", ["/no/such/directory/x", "/", "/dev/fd/999999", "a\0b", "/dev/fd"])
def test_what_cannot_be_written(path):
    """A missing directory, a directory and an impossible name are StorageErrors."""
    with pytest.raises(StorageError, match="cannot write"):
        open_sink(path)


def test_a_full_device():
    """A device is written straight; that it is full is a StorageError."""
    with open_sink("/dev/full") as sink, pytest.raises(StorageError, match="No space left"):
        sink.write([b"x"])
    with open_sink("/dev/null") as sink:
        sink.write([b"x", Zeros(10_000_000)])
        sink.commit()
        assert sink.position == 10_000_001
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_no_space(tmp_path, monkeypatch):
    """No space is a StorageError that says how much is free; the temporary file goes."""
    with open_sink(str(tmp_path / "x")) as sink:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("xsave.host.sink.write_vectors", full)
        with pytest.raises(StorageError, match=r"No space left.*\d+ bytes are free") as found:
            sink.write([b"x" * 100])
    assert found.value.facts["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_precheck(tmp_path):
    """precheck knows before the first byte that something cannot fit."""
    with open_sink(str(tmp_path / "x")) as sink:
        sink.precheck(1)
        with pytest.raises(StorageError, match=r"bytes are free.*needed"):
            sink.precheck(1 << 62)


def test_a_failed_sync_is_an_error(tmp_path, monkeypatch):
    """An image that may not be on disk is not put in its place."""

    def fail(_fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_sink(str(tmp_path / "x")) as sink:
        sink.write([b"x"])
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            sink.commit()
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_left():
    """A closed pipe is BrokenPipe, which is a StorageError of its own kind."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with DescriptorSink(write_fd, "pipe") as sink, pytest.raises(BrokenPipe):
        sink.write([b"x"])
    assert issubclass(BrokenPipe, StorageError)


def test_a_pipe_that_does_not_block():
    """A non-blocking descriptor is waited for."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    found = []

    def drain():
        with open(read_fd, "rb") as pipe:  # noqa: PTH123 - a descriptor
            found.append(len(pipe.read()))

    thread = threading.Thread(target=drain)
    thread.start()
    with DescriptorSink(write_fd, "pipe") as sink:
        sink.write([Zeros(3_000_000), b"x" * 3_000_000])
        sink.commit()
    thread.join(10)
    assert found == [6_000_000]


WRITE = """
import sys
from xsave.host.channel import open_sink
with open_sink(sys.argv[1]) as sink:
    sink.write([b"image"])
    sink.commit()
print("!", end="")
"""


@pytest.mark.parametrize("path", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output(tmp_path, path):
    """Every name of stdout writes to stdout, pipe or file, and leaves it open."""
    command = [sys.executable, "-c", WRITE, path]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=root)
    assert done.stdout == b"image!"
    with (tmp_path / "out").open("wb") as out:
        out.write(b"before ")
        out.flush()
        subprocess.run(command, stdout=out, check=True, cwd=root)
    assert (tmp_path / "out").read_bytes() == b"before image!"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_fifo(tmp_path):
    """A named pipe is written to, not replaced."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    found = []
    thread = threading.Thread(target=lambda: found.append(path.read_bytes()))
    thread.start()
    with open_sink(str(path)) as sink:
        sink.write([b"through"])
        sink.commit()
    thread.join(10)
    assert found == [b"through"]
    assert stat.S_ISFIFO(path.stat().st_mode)
