"""Linux at work, saved, restored, checkpointed, over and over.

    make test-cycles CYCLES=100

does so many of each kernel, on one and on two vCPUs; the usual run does three of each kernel on
two. The guest is preemptible wherever the kernel can be made so, and hard at work all the time
(busywork.py), also on a disk, the same one on either host.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess

import pytest

from tests.distro.blockdevice import is_sound
from tests.distro.busywork import ramdisk
from tests.distro.over_and_over import (
    DIRECTORY,
    KERNELS,
    PATIENCE_S,
    boot,
    busybox,
    ticks,
    told,
    wait_for_tick,
    well,
)
from tests.flows.flow import MIB, destroy, nothing_is_left, restore, save, state, wait_for
from xsave.host.host import add_host
from xsave.image.buffers import nbytes
from xsave.save import save as save_flow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

CYCLES = int(os.environ.get("XSAVE_CYCLES", "0"))
VCPUS = [1, 2] if CYCLES else [2]
DISK_BYTES = 24 * MIB
#: What to do with the image, in turn.
KINDS = ("restored", "checkpointed", "cancelled")
CMDLINE = "console=hvc0 loglevel=5 preempt=full"  # no chatter in the middle of a tick


class EnoughError(Exception):
    """What cancels a save."""


class Guest:
    """A Linux that moves between two hosts; all that it ever said."""

    def __init__(self, hosts, path):
        self.hosts = itertools.cycle(hosts)
        self.host = next(self.hosts)
        self.path = path
        self.past = ""

    def said(self):
        return self.past + told(self.host)

    def tick(self):
        """Wait for a tick that was not there."""
        seen = ticks(self.said())
        wait_for_tick(self.host, seen[-1][0] + 1 if seen else 1, lambda _: self.said())

    def do(self, line):
        """Have the guest do a line of shell that succeeds; return what was said meanwhile."""
        before = len(told(self.host))
        with self.host.find("g") as domctl:
            domctl.console_attach().sendall(line.encode() + b"\n")

        def done():
            assert state(self.host) == "running", self.said()[-2000:]
            said = told(self.host)[before:]
            return said if re.search(r"^DONE \d+$", said, re.M) else None

        said = wait_for(done, PATIENCE_S)
        assert re.search(r"^DONE 0$", said, re.M), said
        return said

    def hashes(self):
        """What the guest makes of the files nobody changes."""
        said = self.do("sha256sum /work/file.? /disk/file.?")
        found = dict(
            reversed(line.split()) for line in re.findall(r"^[0-9a-f]{64}  .+$", said, re.M)
        )
        assert len(found) == 16
        assert all(found[f"/work/file.{i}"] == found[f"/disk/file.{i}"] for i in range(8))
        return found

    def forget_cached(self):
        """Have what is read next come from the disk."""
        self.do("sync; echo 3 > /proc/sys/vm/drop_caches")

    def unmount(self):
        """End the work on the disk, and have what was written last compared once more: by the
        guest, with nothing in its cache."""
        self.do("echo > /work/end.fsync; until [ -e /work/ended.fsync ]; do sleep 0.1; done")
        self.do("umount /disk && mount -t ext4 -o ro /dev/xvda /disk")
        self.do("cat /work/sum.? | sha256sum -c")
        hashes = self.hashes()
        self.do("umount /disk")
        return hashes

    def rounds(self, names):
        """How often each piece of work was done."""
        files = " ".join(f"/work/n.{name}" for name in names)
        text = self.do(f"cat {files} 2> /dev/null; true")
        found = [int(n) for n in re.findall(r"^(\d+)$", text, re.M)]
        return found if len(found) == len(names) else None

    def restored(self):
        """Into another domain, on the other host."""
        save(self.host, self.path, leave="paused")
        self.past = self.said()  # its last words
        destroy(self.host)
        self.host = next(self.hosts)
        restore(self.host, self.path)

    def checkpointed(self):
        """Written whole, and going on."""
        save(self.host, self.path, leave="running")

    def cancelled(self):
        """Written in part."""
        left = 20 * MIB

        def write(buffers):
            nonlocal left
            left -= sum(map(nbytes, buffers))
            if left < 0:
                raise EnoughError

        with self.host.find("g") as domctl, pytest.raises(EnoughError):
            save_flow(domctl, write, commit=lambda: None)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("vcpus", VCPUS)
def test_at_work(xsave_home, kernel, tmp_path, vcpus):
    """No tick is lost and none comes twice, no kernel complains, no piece of work comes out wrong
    and each goes on, and the files are the same after each cycle."""
    archive, names = ramdisk(busybox(), DIRECTORY, kernel)
    initrd, disk = tmp_path / "initrd", tmp_path / "disk"
    initrd.write_bytes(archive)
    disk.touch()
    os.truncate(disk, DISK_BYTES)
    hosts = [add_host(name, 512 * MIB, seed=seed) for seed, name in enumerate("ab")]
    guest = Guest(hosts, tmp_path / "img")
    boot(guest.host, kernel, str(initrd), vcpus, CMDLINE, disks=[f"{disk},raw,xvda,w"])
    guest.tick()
    guest.do("dmesg | grep 'Dynamic Preempt: full'")
    before = wait_for(lambda: guest.rounds(names), PATIENCE_S)
    files = guest.hashes()
    for number in range(CYCLES or len(KINDS)):
        kind = KINDS[number % len(KINDS)]
        getattr(guest, kind)()
        guest.tick()
        guest.forget_cached()
        assert guest.hashes() == files, f"cycle {number + 1}, {kind}"
        correct(guest.said(), vcpus)
        print(f"cycle {number + 1}, {kind}: tick {ticks(guest.said())[-1][0]}", flush=True)
    wait_for(lambda: all(map(int.__lt__, before, guest.rounds(names))), PATIENCE_S)
    assert guest.unmount() == files
    correct(guest.said(), vcpus)
    destroy(guest.host)
    for host in hosts:
        nothing_is_left(host)
    is_sound(disk)
    assert on_disk(disk) in ({}, files)


def on_disk(disk):
    """The hashes of those files as the host finds them on the disk, and of their like in memory;
    none where there is no debugfs."""
    if not shutil.which("debugfs"):
        return {}
    found = {}
    for i in range(8):
        command = ["debugfs", "-R", f"cat /file.{i}", str(disk)]
        contents = subprocess.run(command, check=True, capture_output=True).stdout
        found |= dict.fromkeys((f"/{at}/file.{i}" for at in ("work", "disk")), sha256(contents))
    return found


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def correct(said, vcpus):
    """All is well, and nothing came out wrong."""
    well(said, vcpus)
    assert "WRONG" not in said
