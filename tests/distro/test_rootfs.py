"""A distribution's own root file system on a PV block device: Debian 12 with systemd, to its login.

It is saved, restored and migrated while somebody is logged in, and what was written is read from
the disk again each time. XSAVE_DISTRO_KERNELS must hold rootfs.ext4 (tests/distro/rootfs makes it)
and the modules of the kernel's block frontend and ext4 (tests/distro/fetch).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import time

import pytest

from tests.conftest import directory_named_by
from tests.distro.blockdevice import modules
from tests.distro.initramfs import archive
from tests.flows.flow import console, nothing_is_left, restore, save, state, wait_for
from xsave.host.create import create
from xsave.host.host import add_host
from xsave.migrate import migrate

pytestmark = pytest.mark.slow

MIB = 1 << 20
#: To the login it is half a minute on an idle machine.
PATIENCE_S = 900
INIT = """#!/busybox sh
/busybox mkdir -p /bin /sbin /proc /sys /dev /root
/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in {modules}; do insmod /$module.ko || echo "NO $module"; done
until test -b /dev/xvda; do sleep 0.1; done
mount -t ext4 /dev/xvda /root || {{ echo "NO ROOT"; exec sh; }}
umount /sys /proc
mount -o move /dev /root/dev
exec switch_root /root /sbin/init
"""
COMPLAINTS = re.compile(
    r"BUG:|Oops|WARNING:|Call Trace|Kernel panic|I/O error|EXT4-fs error|segfault"
)


def ramdisk(busybox, found):
    """Return an initial ramdisk that loads these modules, mounts xvda and goes on with its init."""
    return archive(
        {
            "init": INIT.format(
                modules=" ".join(name.removesuffix(".ko") for name in found)
            ).encode(),
            "busybox": busybox.read_bytes(),
            "sbin": None,
            **found,
        }
    )


@pytest.fixture(params=["6.1.*-cloud-amd64", "6.12.*[0-9]-amd64"])
def guest(request, tmp_path):
    """(kernel, initial ramdisk, a copy of the root file system that may be written)."""
    directory = directory_named_by("XSAVE_DISTRO_KERNELS")
    root = directory / "rootfs.ext4"
    if not root.exists():
        pytest.skip(f"no rootfs.ext4 in {directory} (tests/distro/rootfs makes it)")
    kernels = sorted(
        path
        for path in directory.glob(f"vmlinuz-{request.param}")
        if (directory / path.name.replace("vmlinuz", "modules")).is_dir()
    )
    if not kernels:
        pytest.skip(f"no kernel {request.param} with its modules in {directory}")
    kernel = kernels[-1]
    initrd = tmp_path / "initrd"
    initrd.write_bytes(ramdisk(directory / "busybox", modules(directory, kernel.name)))
    copy = tmp_path / "root.img"
    subprocess.run(["cp", "--sparse=always", root, copy], check=True)
    return str(kernel), str(initrd), copy


class Terminal:
    """Somebody at the console of the domain `g`."""

    def __init__(self, host):
        self._domctl = host.find("g")
        self._sock = self._domctl.console_attach()
        self._sock.settimeout(1)
        self._nr = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._domctl.close()

    def until(self, pattern):
        """Read until this comes; return all that was said, and fail if it does not come."""
        heard = b""
        deadline = time.monotonic() + PATIENCE_S
        while not re.search(pattern, heard):
            assert time.monotonic() < deadline, heard[-2000:].decode(errors="replace")
            with contextlib.suppress(TimeoutError):
                piece = self._sock.recv(4096)
                assert piece, heard[-2000:].decode(errors="replace")
                heard += piece
        return heard.decode(errors="replace").replace("\r", "")

    def log_in(self):
        """As root, who has no password; wide lines, so that nothing is broken."""
        self._sock.sendall(b"\n")
        self.until(rb"login: ")
        self._sock.sendall(b"root\n")
        self.until(rb"# ")
        self.run(
            "stty cols 1000; bind 'set enable-bracketed-paste off'; unset PROMPT_COMMAND; PS1="
        )

    def run(self, command):
        """Return what a command printed."""
        self._nr += 1
        # The marks are in pieces where they are typed: the terminal's echo is not the answer.
        self._sock.sendall(f"echo BE''GIN{self._nr}; {command}; echo E''ND{self._nr}\n".encode())
        said = self.until(rb"END%d\r?\n" % self._nr)
        return re.search(rf"BEGIN{self._nr}\n(.*)END{self._nr}\n", said, re.DOTALL)[1]


def sums(terminal):
    """What the guest reads from its disk, not from its memory."""
    terminal.run("sync; echo 3 > /proc/sys/vm/drop_caches")
    return terminal.run("sha256sum /var/tmp/mine /usr/bin/bash /usr/lib/x86_64-linux-gnu/libc.so.6")


@pytest.fixture
def hosts(xsave_home):
    return add_host("a", 768 * MIB, seed=3), add_host("b", 768 * MIB, seed=4)


def test_debian_lives_on_its_disk(hosts, guest, tmp_path):
    """systemd brings Debian up to its login with nothing failed. Somebody logs in; saved and
    restored, then migrated, the same shell goes on, and the files it wrote and those it came
    with read from the disk as before. Powered off by systemd, its file system is clean and holds
    what was written."""
    here, there = hosts
    kernel, initrd, root = guest
    create(
        here, "g", kernel=kernel, ramdisk=initrd, cmdline="console=hvc0 quiet",
        memory_bytes=384 * MIB, disks=[f"{root},raw,xvda,w"],
    )  # fmt: skip
    wait_for(lambda: "login: " in alive(here), PATIENCE_S)
    with Terminal(here) as terminal:
        terminal.log_in()
        assert terminal.run("cat /proc/1/comm") == "systemd\n"
        assert terminal.run("sh -c 'readlink /proc/$$/exe'") == "/usr/bin/dash\n"
        assert terminal.run("findmnt -no SOURCE /") == "/dev/xvda\n"
        terminal.run("systemctl is-system-running --wait")
        assert terminal.run("systemctl --failed --no-legend | cat") == ""
        terminal.run("dd if=/dev/urandom of=/var/tmp/mine bs=64k count=50 conv=fsync")
        before, shell = sums(terminal), terminal.run("echo $$")
    assert len(before.splitlines()) == 3
    save(here, tmp_path / "img")
    restore(here, tmp_path / "img")
    with Terminal(here) as terminal:
        assert (sums(terminal), terminal.run("echo $$")) == (before, shell)
    with here.find("g") as domctl:
        migrate(domctl, there)
    with Terminal(there) as terminal:
        assert (sums(terminal), terminal.run("echo $$")) == (before, shell)
        terminal.run("echo after >> /var/tmp/mine; sync")
        mine = sums(terminal).split()[0]
        assert COMPLAINTS.findall(terminal.run("dmesg")) == []
    with there.find("g") as domctl:
        domctl.shutdown("poweroff")
    wait_for(lambda: state(there) is None, PATIENCE_S)
    nothing_is_left(there)
    assert file_in(root, "/var/tmp/mine") == mine


def alive(host):
    """The console, as long as the domain runs."""
    assert state(host) == "running"
    return console(host)


def file_in(image, path):
    """Return the sha256 of a file in an ext4 image that fsck finds nothing wrong with."""
    programs = os.environ["PATH"] + ":/usr/sbin:/sbin"
    fsck, debugfs = (shutil.which(name, path=programs) for name in ("e2fsck", "debugfs"))
    if not fsck or not debugfs:
        pytest.skip("no e2fsck or debugfs to look at the disk with")
    subprocess.run([fsck, "-fn", image], check=True, capture_output=True)
    found = subprocess.run([debugfs, "-R", f"cat {path}", image], check=True, capture_output=True)
    return hashlib.sha256(found.stdout).hexdigest()
