"""Distributions' kernels as they come: booted, asked, saved, rebooted, crashed.

XSAVE_DISTRO_KERNELS names a directory of vmlinuz-* and a static busybox; tests/distro/fetch fills
one from Debian's archive.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.conftest import directory_named_by
from tests.distro.initramfs import initramfs
from tests.flows.flow import (
    console,
    destroy,
    nothing_is_left,
    restore,
    save,
    state,
    wait_for,
)
from xsave.errors import NotFound
from xsave.host.create import create
from xsave.host.host import add_host

pytestmark = pytest.mark.slow

MIB = 1 << 20
#: Booting takes 4 s on an idle machine with one vCPU.
PATIENCE_S = 600
#: What a kernel prints when something is wrong with it, or with its processors.
COMPLAINTS = re.compile(
    r"BUG:|Oops|WARNING:|Call Trace|detected stall|Kernel panic|general protection|segfault"
    r"|W\+X.*FAILED"
)


def kernels():
    """Return the kernels there are to test, none if there is no directory."""
    directory = Path(os.environ.get("XSAVE_DISTRO_KERNELS", "/nonexistent"))
    return sorted(path.name for path in directory.glob("vmlinuz-*")) or ["none"]


@pytest.fixture(scope="module")
def directory():
    return directory_named_by("XSAVE_DISTRO_KERNELS")


@pytest.fixture(params=kernels())
def kernel(request, directory):
    """Each kernel in turn."""
    if request.param == "none":
        pytest.skip(f"no vmlinuz-* in {directory}")
    return str(directory / request.param)


@pytest.fixture(scope="module")
def ramdisk(directory, tmp_path_factory):
    if not (directory / "busybox").is_file():
        pytest.skip(f"no static busybox in {directory}")
    path = tmp_path_factory.mktemp("ramdisk") / "initrd"
    path.write_bytes(initramfs((directory / "busybox").read_bytes()))
    return str(path)


@pytest.fixture
def host(xsave_home):
    return add_host("a", 512 * MIB, seed=3)


def boot(host, kernel, ramdisk, **options):
    create(
        host,
        "g",
        kernel=kernel,
        ramdisk=ramdisk,
        cmdline="console=hvc0",
        memory_bytes=256 * MIB,
        **options,
    )


def told(host):
    """The console with newlines as they are everywhere else. Raises nothing."""
    return console(host).replace("\r\n", "\n")


def ticks(text):
    """[(number, "cpus=N HASH")] of what user space printed."""
    return [(int(n), rest) for n, rest in re.findall(r"^TICK (\d+) (.+)\n", text, re.MULTILINE)]


def wait_for_ticks(host, last, after=""):
    """Wait until user space has ticked so far behind this text; return what was said there.

    Fails at once if the domain ends."""

    def reached():
        text = told(host).rpartition(after)[2] if after else told(host)
        if ticks(text) and ticks(text)[-1][0] >= last:
            return text
        assert state(host) == "running", told(host)[-2000:]
        return None

    return wait_for(reached, PATIENCE_S)


def without_complaint(text):
    """Assert that the kernel found nothing wrong, and that each tick is the last one's next."""
    assert COMPLAINTS.findall(text) == []
    numbers = [n for n, _ in ticks(text)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert len({rest for _, rest in ticks(text)}) == 1


@pytest.mark.parametrize("vcpus", [1, 2])
def test_from_boot_to_boot(host, kernel, ramdisk, tmp_path, vcpus):
    """A kernel as it comes boots to user space with all its processors; it is saved in one domain
    and goes on in another, without a tick lost; rebooted there, it comes up again; asked to power
    off, it is gone."""
    boot(host, kernel, ramdisk, vcpus=vcpus)
    first = wait_for_ticks(host, 3)
    without_complaint(first)
    assert f"cpus={vcpus} " in first
    save(host, tmp_path / "img")
    restore(host, tmp_path / "img")
    second = wait_for_ticks(host, ticks(first)[-1][0] + 3)
    without_complaint(second)
    assert ticks(second)[0][1] == ticks(first)[0][1]
    with host.find("g") as domctl:
        domctl.shutdown("reboot")
    wait_for(lambda: "it is started again" in console(host), PATIENCE_S)
    again = wait_for_ticks(host, 2, after="it is started again")
    without_complaint(again)
    assert ticks(again)[0][0] == 1
    with host.find("g") as domctl:
        domctl.shutdown("poweroff")
    wait_for(lambda: state(host) is None, PATIENCE_S)
    nothing_is_left(host)


def test_its_console_is_read_and_a_panic_is_a_crash(host, kernel, ramdisk):
    """What is typed reaches user space; a kernel that panics is a crashed domain with its last
    words on the console."""
    boot(host, kernel, ramdisk)
    wait_for_ticks(host, 1)
    type_line(host, b"echo one two\n")
    wait_for(lambda: "heard  one two" in told(host), PATIENCE_S)
    type_line(host, b"crash\n")
    wait_for(lambda: state(host) == "crashed", PATIENCE_S)
    assert "Kernel panic - not syncing: sysrq triggered crash" in told(host)
    destroy(host)
    nothing_is_left(host)


def type_line(host, line):
    """Type on the guest's console, and stay until it has been echoed."""
    try:
        with host.find("g") as domctl:
            sock = domctl.console_attach()
            sock.sendall(line)
            sock.settimeout(PATIENCE_S)
            heard = b""
            while line.strip() not in heard:
                heard += sock.recv(4096)
    except NotFound:
        pytest.fail("the domain is gone")
