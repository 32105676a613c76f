"""A kernel that is unpacked before anybody asks: the same bytes, the same errors, the file."""

from __future__ import annotations

import pytest

from tests.guest.bzimages import bzimage, payload
from tests.guest.elves import make_elf
from xsave.errors import HostCannotTake, StorageError
from xsave.host.bootconfig import BUILTIN_KERNEL
from xsave.host.create import create
from xsave.host.host import add_host
from xsave.host.prestart import WaitingProcess
from xsave.host.unpacking import Unpacking, unpack

KERNEL = make_elf()


def test_the_same_as_without_a_thread(tmp_path):
    """The ELF file inside, or the file itself."""
    for name, data in (("vmlinuz", bzimage(payload(KERNEL, "lz4"))), ("elf", KERNEL)):
        path = tmp_path / name
        path.write_bytes(data)
        assert Unpacking(str(path)).result() == unpack(str(path)) == KERNEL


def test_the_same_errors(tmp_path):
    """What is wrong is raised where the kernel is wanted, each time."""
    damaged = tmp_path / "vmlinuz"
    damaged.write_bytes(bzimage(payload(KERNEL, "lz4", 7)))
    for path, error in ((damaged, HostCannotTake), (tmp_path / "none", StorageError)):
        begun = Unpacking(str(path))
        for _ in range(2):
            with pytest.raises(error, match=path.name):
                begun.result()


@pytest.fixture
def host(xsave_home):
    return add_host("localhost", 128 << 20, seed=6)


@pytest.mark.parametrize("told", ["the same", "another", None])
def test_the_kernel_that_is_asked_for(host, tmp_path, told):
    """What the process was told in advance saves time, or is forgotten."""
    other = tmp_path / "other"
    other.write_bytes(b"no kernel")
    kernel = str(BUILTIN_KERNEL)
    process = WaitingProcess(host.directory, {"the same": kernel, "another": str(other)}.get(told))
    info = create(host, "g", kernel=kernel, process=process, paused=True)
    assert info.state == "paused"
    with host.find("g") as domctl:
        domctl.destroy()


def test_a_damaged_kernel_leaves_nothing(host, tmp_path):
    """The error names the file, and the domain was never there."""
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"no kernel")
    process = WaitingProcess(host.directory, str(damaged))
    with pytest.raises(HostCannotTake, match="damaged: not a 64-bit Xen PV kernel"):
        create(host, "g", kernel=str(damaged), process=process)
    assert host.domains() == []


def test_a_process_told_for_nothing_ends(host):
    """Its command has ended before it had a domain."""
    with WaitingProcess(host.directory, str(BUILTIN_KERNEL)) as process:
        child = process.child
    assert child.wait(30) == 0
