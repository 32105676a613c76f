"""Disks and the flows: who has a disk's file when, and what happens if it is not to be had.

The built-in guest does not use its disk; tests/distro has kernels that do.
"""

from __future__ import annotations

import json
import os

import pytest

from tests.flows.flow import (
    MIB,
    console,
    create,
    destroy,
    nothing_is_left,
    processes,
    restore,
    runs_on,
    save,
    state,
    ticks,
    wait_for,
    wait_for_tick,
)
from xsave.errors import GuestStateError, HostCannotTake, StorageError, SuspendFailed, UsageError
from xsave.guest.xen.domctl import Domctl
from xsave.host.channel import open_sink
from xsave.host.disk.image import open_image
from xsave.host.disk.spec import parse
from xsave.host.host import add_host
from xsave.host.spawn import spawn
from xsave.image.buffers import reader
from xsave.image.stream import StreamDecoder
from xsave.image.xl import XlHeader
from xsave.migrate import migrate
from xsave.save import save as save_flow


@pytest.fixture
def host(xsave_home):
    return add_host("a", 64 * MIB, seed=3)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


def spec(disk, mode="w"):
    return f"{disk},raw,xvda,{mode}"


def is_free(disk):
    """Whether a writer could have the file."""
    try:
        open_image(parse(spec(disk))).close()
    except StorageError:
        return False
    return True


def test_a_disk_has_one_writer(host, disk, tmp_path):
    """While a domain has it nobody else may; saved, it is free at once, and restored, it is not."""
    create(host, disks=[spec(disk)])
    with pytest.raises(StorageError, match="in use by another domain"):
        create(host, "h", disks=[spec(disk, "r")])
    assert [domain.name for domain in host.domains()] == ["g"]
    wait_for_tick(host)
    save(host, tmp_path / "img")
    assert is_free(disk)
    assert json.loads(config_of(tmp_path / "img"))["disks"] == [
        {"pdev_path": str(disk), "vdev": "xvda", "format": "raw", "readwrite": 1}
    ]
    restore(host, tmp_path / "img")
    assert not is_free(disk)
    runs_on(host)
    destroy(host)
    assert is_free(disk)
    nothing_is_left(host)


def config_of(image):
    """The configuration in the image."""
    items = StreamDecoder(reader(image.read_bytes()))
    return next(item.value.config for item in items if isinstance(item.value, XlHeader))


def test_readers_share(host, disk):
    """Two domains may read one file."""
    create(host, disks=[spec(disk, "r")])
    create(host, "h", disks=[spec(disk, "r")])
    assert not is_free(disk)
    destroy(host)
    destroy(host, "h")
    nothing_is_left(host)


def test_what_cannot_be_attached_leaves_nothing(host, tmp_path, disk):
    """A file that is not there, a wrong format, a wrong specification: one error, no domain."""
    disk.write_bytes(b"QFI\xfb" + bytes(4096))
    for text, error in (
        (f"{tmp_path}/none,raw,xvda,w", StorageError),
        (f"{tmp_path},raw,xvda,w", StorageError),
        (spec(disk), StorageError),
        (f"{disk},qcow2,xvda,w", StorageError),
        (f"{disk},raw,,w", UsageError),
    ):
        with pytest.raises(error):
            create(host, disks=[text])
    nothing_is_left(host)


@pytest.mark.parametrize("trouble", ["missing", "busy", "format"])
def test_a_restore_without_its_disk_does_not_begin(host, disk, tmp_path, trouble):
    """The error names the file, nothing is left, and the image can be restored later."""
    create(host, disks=[spec(disk)])
    wait_for_tick(host)
    save(host, tmp_path / "img")
    stranger = None
    if trouble == "missing":
        disk.rename(tmp_path / "elsewhere")
    elif trouble == "busy":
        stranger = open_image(parse(spec(disk)))
    else:
        image = (tmp_path / "img").read_bytes()
        (tmp_path / "img").write_bytes(image.replace(b'"format": "raw"', b'"format": "vhd"'))
    error = HostCannotTake if trouble == "format" else StorageError
    with pytest.raises(error, match=str(disk)):
        restore(host, tmp_path / "img")
    nothing_is_left(host)
    if trouble == "missing":
        (tmp_path / "elsewhere").rename(disk)
    elif stranger:
        stranger.close()
    else:
        (tmp_path / "img").write_bytes(image)
    restore(host, tmp_path / "img")
    runs_on(host)
    destroy(host)


def test_a_restore_with_the_disk_under_another_name(host, disk, tmp_path):
    """The file that is named instead is the guest's from then on, and the next image says so; a
    disk that the image has not got is an error and leaves nothing."""
    create(host, disks=[spec(disk)])
    wait_for_tick(host)
    save(host, tmp_path / "img")
    other = disk.rename(tmp_path / "other.img")
    with pytest.raises(UsageError, match="xvdb: the image has no such disk"):
        restore(host, tmp_path / "img", disk_files={"xvdb": str(other)})
    nothing_is_left(host)
    restore(host, tmp_path / "img", disk_files={"xvda": str(other)})
    assert not is_free(other)
    runs_on(host)
    save(host, tmp_path / "img")
    assert json.loads(config_of(tmp_path / "img"))["disks"][0]["pdev_path"] == str(other)
    nothing_is_left(host)


def test_a_disk_migrates_with_its_guest(host, disk):
    """The target has the file, and nobody else, the source not either."""
    target = add_host("b", 64 * MIB, seed=4)
    create(host, disks=[spec(disk)])
    wait_for_tick(host)
    with host.find("g") as domctl:
        migrate(domctl, target)
    assert state(host) is None
    assert not is_free(disk)
    runs_on(target)
    destroy(target)
    assert is_free(disk)
    nothing_is_left(host)
    nothing_is_left(target)


def test_a_failed_migration_brings_the_disk_back(host, disk, monkeypatch):
    """A stranger has the file between the two: the target gives up, and as soon as the file is
    free again the guest goes on at the source with it."""
    target = add_host("b", 64 * MIB, seed=4)
    create(host, disks=[spec(disk)])
    wait_for_tick(host)
    strangers = []
    hold, resume = Domctl.hold, Domctl.resume

    def hold_and_lose(self):
        hold(self)
        strangers.append(open_image(parse(spec(disk))))

    def resume_after(self, **options):
        strangers.pop().close()
        resume(self, **options)

    monkeypatch.setattr(Domctl, "hold", hold_and_lose)
    monkeypatch.setattr(Domctl, "resume", resume_after)
    with host.find("g") as domctl, pytest.raises(StorageError, match="in use by another domain"):
        migrate(domctl, target)
    nothing_is_left(target)
    assert not is_free(disk)
    runs_on(host)
    destroy(host)


def test_a_receiver_has_the_disk_when_it_says_so(host, disk, tmp_path):
    """A domain that is to be handed over only looks at the file, and has it when it takes over; a
    missing one is an error at once."""
    disks = [parse(spec(disk)).to_json()]
    with spawn(host, "g") as domctl:
        domctl.begin(nr_vcpus=1, max_pages=256, disks=disks, disks_later=True)
        domctl.wait_begun()
        assert is_free(disk)
        with pytest.raises(GuestStateError, match="not complete"):  # there is nothing to run
            domctl.take_over("i")
        assert not is_free(disk)
        domctl.abandon()
    assert is_free(disk)
    disk.unlink()
    with spawn(host, "h") as domctl:
        domctl.begin(nr_vcpus=1, max_pages=256, disks=disks, disks_later=True)
        with pytest.raises(StorageError, match="No such file"):
            domctl.wait_begun()
        domctl.abandon()
    nothing_is_left(host)


def test_a_guest_does_not_go_on_without_its_disk(host, disk, monkeypatch):
    """Held for an undecided migration, and the file in another's hands: it stays suspended until
    the file is free, and unpause says why."""
    create(host, disks=[spec(disk)])
    wait_for_tick(host)
    with host.find("g") as domctl:
        domctl.suspend(lambda stage: None)
        domctl.hold()
    stranger = open_image(parse(spec(disk)))
    with host.find("g") as domctl:
        with pytest.raises(StorageError, match="in use"):
            domctl.unpause()
        assert state(host) == "suspended"
        stranger.close()
        domctl.unpause()
    assert not is_free(disk)
    runs_on(host)
    destroy(host)


def test_a_cancelled_save_keeps_the_disk(host, disk, tmp_path):
    """It is nobody else's at any moment."""
    create(host, disks=[spec(disk)])
    wait_for_tick(host)

    def fail():
        assert not is_free(disk)
        raise StorageError("no")

    with (
        host.find("g") as domctl,
        open_sink(str(tmp_path / "img")) as sink,
        pytest.raises(StorageError, match="no"),
    ):
        save_flow(domctl, sink.write, commit=fail)
    assert not is_free(disk)
    runs_on(host)
    destroy(host)


def test_a_reboot_keeps_the_disk(host, disk):
    """The new guest in the same domain has the same devices; nobody got between."""
    create(host, disks=[spec(disk)])
    wait_for_tick(host, after=2)
    with host.find("g") as domctl:
        domctl.shutdown("reboot")
    wait_for(lambda: "it is started again" in console(host))
    assert not is_free(disk)
    wait_for(lambda: ticks(console(host).rpartition("it is started again")[2]))
    destroy(host)
    assert is_free(disk)


def test_a_killed_domain_lets_go(host, disk):
    """kill -9 frees the lock with the process."""
    create(host, disks=[spec(disk)])
    assert not is_free(disk)
    for pid in processes(host):
        os.kill(pid, 9)
    wait_for(lambda: is_free(disk))
    nothing_is_left(host)


def test_a_deterministic_guest_with_a_disk(host, disk, tmp_path):
    """Two runs of the same commands give the same image to the byte."""
    images = []
    for i in range(2):
        create(host, disks=[spec(disk)], deterministic=7)
        save(host, tmp_path / f"img{i}")
        images.append((tmp_path / f"img{i}").read_bytes())
    assert images[0] == images[1]


def test_suspend_errors_are_of_the_suspend(host, disk):
    """A paused guest with a disk is refused as one without is."""
    create(host, disks=[spec(disk)], paused=True)
    with host.find("g") as domctl, pytest.raises(SuspendFailed):
        domctl.suspend(lambda stage: None)
    destroy(host)
