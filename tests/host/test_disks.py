"""A domain's disks: files that are there or not, locks, threads that do the work in order."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest

from xsave.errors import StorageError
from xsave.host.disk.disks import AttachedDisk, Disks, Worker
from xsave.host.disk.file import DiskFile
from xsave.host.disk.image import check, open_image
from xsave.host.disk.spec import DiskSpec, parse


def ignore():
    """Nobody waits."""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.img"
    path.write_bytes(bytes(8192 + 100))
    return path


def spec(path, mode="w"):
    return parse(f"{path},raw,xvda,{mode}")


def test_a_raw_image(path):
    """Its whole sectors are the disk; what is written is in the file."""
    disk = open_image(spec(path))
    assert disk.nr_sectors == 16
    disk.write(512, [memoryview(b"a" * 512), memoryview(b"b" * 1024)])
    data = bytearray(2048)
    disk.read(0, [memoryview(data)])
    disk.flush()
    disk.close()
    assert data == bytes(512) + b"a" * 512 + b"b" * 1024
    assert path.read_bytes()[512:2048] == data[512:]


def test_more_buffers_than_one_call_takes(path):
    """A transfer of thousands of pieces is one transfer all the same."""
    file = DiskFile.open(str(path), readonly=False)
    data = os.urandom(3000)
    file.write(7, [memoryview(data)[i : i + 1] for i in range(3000)])
    assert file.read_bytes(7, 3000) == data
    assert file.read_bytes(path.stat().st_size - 2, 5) == bytes(5)
    file.close()


@pytest.mark.parametrize("first", ["w", "r"])
@pytest.mark.parametrize("second", ["w", "r"])
def test_who_may_have_a_file_together(path, first, second):
    """Readers may share it, a writer has it alone; closed, it is anybody's."""
    disk = open_image(spec(path, first))
    if first == second == "r":
        open_image(spec(path, second)).close()
    else:
        with pytest.raises(StorageError, match="in use by another domain"):
            open_image(spec(path, second))
    check(spec(path, second))
    disk.close()
    open_image(spec(path, second)).close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: os.mkfifo(path), "neither a file nor a block device"),
    ],
)
def test_what_is_no_disk(tmp_path, make, says):
    """An error each, that names the file."""
    make(tmp_path / "x")
    for look in (open_image, check):
        with pytest.raises(StorageError, match=says) as caught:
            look(spec(tmp_path / "x"))
        assert str(tmp_path / "x") in str(caught.value)


def test_a_format_given_wrong(path):
    """What somebody has just called raw, and is qcow2, is a mistake; a guest's own bytes are not
    looked at later."""
    path.write_bytes(b"QFI\xfb" + bytes(4096))
    with pytest.raises(StorageError, match="is a qcow2 image"):
        check(spec(path), fresh=True)
    check(spec(path))
    open_image(spec(path)).close()


def test_all_or_none(path, tmp_path):
    """If one of several cannot be had, none is kept."""
    other = DiskSpec(str(tmp_path / "missing"), "raw", "xvdb", readonly=True)
    disks = Disks([spec(path), other], ignore)
    with pytest.raises(StorageError, match="No such file"):
        disks.open()
    open_image(spec(path)).close()


def test_closed_and_opened_again(path):
    """Who gives them up gets them back, unless somebody else has them."""
    disks = Disks([spec(path)], ignore)
    disks.open()
    disks.open()
    disks.close()
    stranger = open_image(spec(path))
    with pytest.raises(StorageError, match="in use"):
        disks.open()
    stranger.close()
    disks.open()
    with pytest.raises(StorageError, match="in use"):
        open_image(spec(path))
    disks.close()
    disks.close()


def test_work_is_done_in_order_and_handed_back_here():
    """By one thread, one after the other; what follows is called by who serves."""
    woken, seen = threading.Semaphore(0), []
    worker = Worker("w", woken.release)
    gate = threading.Event()
    worker.submit(gate.wait, lambda: seen.append(("gate", threading.current_thread())))
    for i in range(5):
        worker.submit(lambda i=i: seen.append(i), lambda: None)
    assert not worker.has_done()
    gate.set()
    for _ in range(6):
        assert woken.acquire(timeout=30)
    assert worker.has_done()
    assert seen == [0, 1, 2, 3, 4]
    worker.serve()
    assert seen[5:] == [("gate", threading.current_thread())]
    worker.stop()


def test_stopping_finishes_what_was_given():
    """Nothing that a guest asked for is dropped."""
    done = []
    worker = Worker("w", ignore)
    for i in range(20):
        worker.submit(lambda i=i: done.append(i), ignore)
    worker.stop()
    assert done == list(range(20))


# -- a disk with a device ---


class SlowImage:
    """An image whose work waits for a gate, and can fail."""

    readonly, nr_sectors = False, 64

    def __init__(self):
        self.gate = threading.Event()
        self.log = []
        self.broken = False

    def _work(self, what):
        assert self.gate.wait(30)
        self.log.append(what)
        if self.broken:
            raise OSError(28, "No space left on device")

    def read(self, offset, buffers):
        self._work("read")

    def write(self, offset, buffers):
        self._work("write")

    def flush(self):
        self._work("flush")

    def close(self):
        self.log.append("close")


class Device:
    """Stands for the guest's device: counts what is in flight."""

    nr_in_flight = 0

    def complete(self, job):
        self.nr_in_flight -= 1


class Write:
    """A job."""

    buffers = ()
    failed = False

    def run(self, disk):
        with contextlib.suppress(OSError):
            disk.write(0, [])


@pytest.fixture
def slow(path):
    """(disk, image, device, a function that waits for one piece of work and hands it back)."""
    woken = threading.Semaphore(0)
    disk = AttachedDisk(spec(path), woken.release, lambda _buffers: True)
    disk._image = image = SlowImage()
    disk.device = Device()

    def serve():
        assert woken.acquire(timeout=30)
        disk.worker.serve()

    yield disk, image, disk.device, serve
    image.gate.set()
    disk.close()


def write(disk):
    disk.device.nr_in_flight += 1
    disk._by_worker(job := Write())
    return job


def test_what_is_lost_is_not_written(slow):
    """Bytes of a guest's memory that never came go to no disk; the request fails."""
    disk, image, _, serve = slow
    disk._have = lambda _buffers: False
    job = write(disk)
    serve()
    assert job.failed
    assert "write" not in image.log
    image.gate.set()


def test_a_suspend_waits_for_the_disk(slow):
    """It counts when what was in flight is done, and has been flushed after that; asking does not
    wait."""
    disk, image, device, serve = slow
    write(disk)
    assert not disk.settled()
    image.gate.set()
    serve()
    assert device.nr_in_flight == 0
    assert not disk.settled()
    assert not disk.settled()
    serve()
    assert disk.settled()
    assert disk.settled()
    assert image.log == ["write", "flush"]
    write(disk)
    serve()
    assert not disk.settled()
    serve()
    assert disk.settled()
    assert image.log == ["write", "flush"] * 2


def test_a_disk_that_cannot_be_flushed(slow):
    """The error is told once; the next attempt tries again."""
    disk, image, _device, serve = slow
    image.gate.set()
    image.broken = True
    write(disk)
    serve()
    assert not disk.settled()
    serve()
    with pytest.raises(StorageError, match="No space left"):
        disk.settled()
    image.broken = False
    assert not disk.settled()
    serve()
    assert disk.settled()


def test_closing_finishes_what_is_in_flight(slow):
    """Before the file is given up, its last request is done and answered."""
    disk, image, device, _serve = slow
    for _ in range(3):
        write(disk)
    image.gate.set()
    disk.close()
    assert device.nr_in_flight == 0
    assert image.log == ["write"] * 3 + ["close"]


def test_an_idle_disk_is_settled_at_once(path):
    """So is one that nobody writes to."""
    for mode in "wr":
        disks = Disks([spec(path, mode)], ignore)
        disks.open()
        assert disks.settled()
        assert not disks.has_done()
        disks.close()
