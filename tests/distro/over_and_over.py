"""What the long runs share: the kernels there are, and what a guest of theirs says.

XSAVE_DISTRO_KERNELS names a directory of vmlinuz-* and a static busybox; tests/distro/fetch fills
one from Debian's archive.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.flows.flow import MIB, console, state, wait_for
from xsave.host.create import create

PATIENCE_S = 600
#: What a kernel prints when something is wrong with it, or with its processors.
COMPLAINTS = re.compile(
    r"BUG:|Oops|WARNING:|Call Trace|detected stall|Kernel panic|general protection|segfault"
    r"|W\+X.*FAILED|I/O error|EXT4-fs error"
)
DIRECTORY = Path(os.environ.get("XSAVE_DISTRO_KERNELS", "/nonexistent"))
KERNELS = sorted(path.name for path in DIRECTORY.glob("vmlinuz-*")) or ["none"]


def boot(host, kernel, ramdisk, vcpus, cmdline="console=hvc0", **options):
    """Boot a kernel by its name; skip where there are none."""
    if not (DIRECTORY / kernel).is_file():
        pytest.skip("XSAVE_DISTRO_KERNELS names no directory with kernels")
    path = str(DIRECTORY / kernel)
    size = 256 * MIB
    options |= {"cmdline": cmdline, "memory_bytes": size, "vcpus": vcpus}
    create(host, "g", kernel=path, ramdisk=ramdisk, **options)


def busybox():
    """The static busybox; skip where there is none."""
    if not (DIRECTORY / "busybox").is_file():
        pytest.skip("XSAVE_DISTRO_KERNELS names no directory with a busybox")
    return (DIRECTORY / "busybox").read_bytes()


def told(host):
    """The console with newlines as they are everywhere else."""
    return console(host).replace("\r\n", "\n")


def ticks(text):
    """[(number, "cpus=N HASH")] of what user space printed."""
    return [(int(n), rest) for n, rest in re.findall(r"^TICK (\d+) (.+)\n", text, re.MULTILINE)]


def wait_for_tick(host, number, said=told):
    """Wait until user space has ticked so far; return what was said. Fails if the domain ends."""

    def reached():
        text = said(host)
        if ticks(text) and ticks(text)[-1][0] >= number:
            return text
        assert state(host) == "running", text[-2000:]
        return None

    return wait_for(reached, PATIENCE_S)


def well(said, vcpus):
    """Nobody complains, each tick is the last one's next, and all processors are there."""
    assert COMPLAINTS.findall(said) == []
    assert [n for n, _ in ticks(said)] == list(range(1, len(ticks(said)) + 1))
    assert {rest.split()[0] for _, rest in ticks(said)} == {f"cpus={vcpus}"}
    assert len({rest for _, rest in ticks(said)}) == 1
