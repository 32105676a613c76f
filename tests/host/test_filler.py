"""Pages brought by another process: the ones waited for, then all, each once."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import signal
import socket
import threading

import numpy as np
import pytest

from xsave.errors import HostCannotTake, UsageError
from xsave.frames import PAGE_SIZE
from xsave.guest.xen.machine import Machine, create_files
from xsave.guest.xen.missing import MissingPages
from xsave.guest.xen.outstanding import Outstanding
from xsave.host import filling
from xsave.host.filler import GO, fork_filler
from xsave.host.filling import Filling

NR_FRAMES = 4096
FIRST = 2048
#: Frames with something to come: shuffled, as those of a guest are.
MFNS = np.random.default_rng(5).permutation(np.arange(FIRST, FIRST + 1500))


@pytest.fixture
def machine(tmp_path_factory, xsave_home):
    """A machine with nothing in its frames."""
    create_files(xsave_home, NR_FRAMES, 1)
    return Machine(xsave_home, "test")


@pytest.fixture
def image(tmp_path):
    """A file of pages, an odd number of bytes from its beginning; each fourth one is zero."""
    pages = np.random.default_rng(6).integers(0, 256, (MFNS.size, PAGE_SIZE), np.uint8)
    pages[::4] = 0
    path = tmp_path / "img"
    path.write_bytes(b"?" * 77 + pages.tobytes())
    return path, pages


@pytest.fixture
def tables(image):
    """The tables of what is to come: every page of the image."""
    fd = Outstanding.create(NR_FRAMES)
    outstanding = Outstanding(fd)
    positions = 77 + PAGE_SIZE * np.arange(MFNS.size, dtype=np.uint64)
    outstanding.put(MFNS, positions)
    yield fd, outstanding
    os.close(fd)


def last_words(sock):
    assert select.select([sock], [], [], 20)[0]
    return json.loads(sock.makefile().readline())


@pytest.fixture
def brought(machine, image, tables):
    """Start the processes; give (sock, guard's pid)."""
    missing = MissingPages(machine.pages.ctypes.data, NR_FRAMES)
    ours, theirs = socket.socketpair()
    with image[0].open("rb") as file, theirs:
        pid = fork_filler(missing, tables[1], file.fileno(), theirs, [])
    yield ours, pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    ours.close()
    missing.close()


def test_what_is_touched_comes(machine, image, tables, brought):
    """Before GO: a page that is touched has the bytes of the image, and nothing else comes; a page
    that is not in the image is zero."""
    rows = [3, 4, 700]
    for row in rows:
        assert (machine.pages[MFNS[row]] == image[1][row]).all()
    assert not machine.pages[FIRST + 1600].any()
    left = np.flatnonzero(tables[1].at[MFNS] == 0).tolist()
    assert left == rows
    assert np.count_nonzero(machine.resident(np.arange(FIRST, NR_FRAMES))) == 4
    assert brought


def test_all_comes_once(machine, image, tables, brought):
    """After GO all comes and stays missing no more; what was there or was written is left alone;
    pages of zeros stay holes."""
    _, pages = image
    other = np.full((1, PAGE_SIZE), 7, np.uint8)
    machine.write_frames(MFNS[10:11].astype(np.uint64), other, np.array([0]))  # another way
    machine.pages[MFNS[11]] = 8  # comes, and is written to
    expected = pages.copy()
    expected[10], expected[11] = 7, 8
    brought[0].sendall(GO)
    assert last_words(brought[0]) == {"done": True}
    resident = machine.resident(MFNS.astype(np.uint64))
    assert resident.tolist() == expected.any(axis=1).tolist()
    assert (machine.pages[MFNS] == expected).all()
    assert not tables[1].at.any()


def test_threads_wait_for_the_same_page(machine, image, brought):
    """Many that touch pages at the same time, while all the others come, find the right bytes."""
    rows = np.random.default_rng(8).permutation(MFNS.size)
    wrong = []

    def look(mine):
        for row in mine.tolist():
            if machine.pages[MFNS[row], -1] != image[1][row, -1]:
                wrong.append(row)

    threads = [threading.Thread(target=look, args=(rows[i % 2 :: 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    brought[0].sendall(GO)
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert last_words(brought[0]) == {"done": True}


def test_a_short_image(machine, image, brought):
    """The image is shorter than it was: that is said, and who waits for a page gets none until it
    has been heard, or half a second has passed."""
    os.truncate(image[0], 77 + 100 * PAGE_SIZE)
    sock, _ = brought
    touched = threading.Event()

    def touch():  # without the GIL, or nobody could listen
        byte = ctypes.create_string_buffer(1)
        address = machine.pages[MFNS[701]].ctypes.data
        ctypes.CDLL(None).memcmp(ctypes.c_void_p(address), byte, 1)
        touched.set()

    threading.Thread(target=touch, daemon=True).start()
    assert "cut shorter" in last_words(sock)["error"]
    assert not touched.wait(0.1)
    assert touched.wait(10)


# ---- as the domain's process has it


@pytest.fixture
def fills(machine, image, tables):
    """A Filling, not started, and what it calls at its end."""
    calls = []
    fd = os.open(image[0], os.O_RDONLY)
    null = os.open(os.devnull, os.O_RDONLY)
    result = Filling(
        machine,
        null,
        [fd, os.dup(tables[0])],
        lambda: calls.append("end"),
        lambda: calls.append("cut off"),
    )
    yield result, calls
    result.stop()
    os.close(null)


def wait_for_end(fill):
    fill._watcher.join(20)
    assert not fill.active


def test_filled(machine, image, fills):
    """start, go, done: nothing is lost and nobody is cut off."""
    fill, calls = fills
    fill.start()
    assert fill.active
    fill.go()
    wait_for_end(fill)
    assert (machine.pages[MFNS] == image[1]).all()
    assert calls == ["end"]
    assert not fill.lost


def test_a_disk_may_read_what_is_there(machine, image, fills, tmp_path):
    """What is handed to the kernel must be there: have() sees to it, for each page of a request;
    without it the kernel refuses."""
    fill, _ = fills
    fill.start()
    buffers = [memoryview(machine.map)[m * PAGE_SIZE : m * PAGE_SIZE + 512] for m in MFNS[1:3]]
    with (tmp_path / "disk").open("wb", buffering=0) as disk:
        with pytest.raises(OSError, match="Bad address"):
            os.writev(disk.fileno(), buffers)
        assert fill.have(buffers)
        assert os.writev(disk.fileno(), buffers) == 1024
    assert (tmp_path / "disk").read_bytes() == image[1][1:3, :512].tobytes()


def test_what_is_freed_has_come(machine, fills, tables):
    """A frame that is given back before its page came is not filled when it is another's."""
    fill, _ = fills
    fill.start()
    mfns = MFNS[1:200].astype(np.uint64)
    fill.settle(mfns)
    assert not tables[1].at[MFNS[1:200]].any()
    for mfn in mfns.tolist():
        machine.map.madvise(mmap.MADV_REMOVE, mfn * PAGE_SIZE, PAGE_SIZE)
    fill.go()
    wait_for_end(fill)
    assert not machine.resident(mfns).any()


def test_lost(image, fills, machine):
    """Who waits when the pages stop coming is let go only after the guest was cut off; what was
    waited for has not come."""
    fill, calls = fills
    os.truncate(image[0], 78)
    fill.start()
    buffer = memoryview(machine.map)[int(MFNS[1]) * PAGE_SIZE :][:1]
    assert not fill.have([buffer])
    wait_for_end(fill)
    assert calls == ["cut off", "end"]
    assert "cut shorter" in fill.lost
    assert not fill.have([buffer])


def test_lost_in_python(image, fills, machine):
    """A thread that waits with the GIL held does not hang for ever."""
    fill, calls = fills
    os.truncate(image[0], 78)
    fill.start()
    assert not machine.pages[MFNS[1]].any()
    wait_for_end(fill)
    assert calls == ["cut off", "end"]


def test_stopped(image, fills, machine, tables):
    """After stop() no page comes, and nobody waits."""
    fill, calls = fills
    fill.start()
    fill.stop()
    assert not machine.pages[MFNS[1]].any()
    assert calls == []
    assert np.count_nonzero(tables[1].at) == MFNS.size


def test_not_given_what_it_takes(machine):
    """A domain that is no lazy restore cannot be filled."""
    with pytest.raises(UsageError):
        Filling(machine, -1, (), print, print).start()


def test_where_it_is_forbidden(fills, monkeypatch):
    """A kernel that does not hand out page faults: one error that says what to look at."""

    def forbidden(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(filling, "MissingPages", forbidden)
    with pytest.raises(HostCannotTake, match="unprivileged_userfaultfd"):
        fills[0].start()


def test_a_machine_on_a_disk(tmp_path, tables, image):
    """Machine memory that is not on tmpfs has no such faults."""
    if os.statvfs(tmp_path).f_fsid == os.statvfs("/dev/shm").f_fsid:
        pytest.skip("the temporary directory is on tmpfs")
    create_files(tmp_path, NR_FRAMES, 1)
    fill = Filling(Machine(tmp_path, "disk"), -1, (os.dup(0), os.dup(tables[0])), print, print)
    with pytest.raises(HostCannotTake, match="not on tmpfs"):
        fill.start()
    fill.stop()
