"""restore --paused and save again, without running: what comes out is what went in."""

from __future__ import annotations

import numpy as np
import pytest

from tests.flows.flow import (
    MIB,
    console,
    create,
    nothing_is_left,
    restore,
    save,
    state,
    wait_for,
    wait_for_tick,
)
from xsave.frames import PageType
from xsave.host.host import add_host
from xsave.image import libxc
from xsave.image.buffers import reader
from xsave.image.stream import PageBatch, StreamDecoder
from xsave.public import SharedInfo, StartInfo, VcpuGuestContext


def again(host, image, target):
    """Restore an image paused and save the domain at once."""
    info = restore(host, image, paused=True, cpu_mismatch="allow")
    assert state(host, info.name) == "paused"
    save(host, target, info.name)


def difference(one, two):
    """Return the first offset at which two files differ, None if they are equal (an assertion
    on megabytes would be explained at length)."""
    a, b = one.read_bytes(), two.read_bytes()
    if a == b:
        return None
    shorter = min(len(a), len(b))
    unequal = np.flatnonzero(
        np.frombuffer(a, np.uint8, shorter) != np.frombuffer(b, np.uint8, shorter)
    )
    return int(unequal[0]) if unequal.size else shorter


def test_builtin_guest(xsave_home, builtin_image, tmp_path):
    """Three hosts in a row, each with its own order of frames: always the same bytes."""
    source = builtin_image
    for seed in range(3):
        host = add_host(f"h{seed}", 64 * MIB, seed)
        target = tmp_path / f"{seed}"
        again(host, source, target)
        assert difference(target, builtin_image) is None
        source = target
        nothing_is_left(host)


def test_builtin_guest_saved_at_any_moment(host, tmp_path):
    """By the real clock, in whatever state its threads and address spaces happen to be:
    always the same bytes, and one that ran on is another."""
    create(host)
    for number in range(2):
        wait_for_tick(host)
        first, second = tmp_path / f"{number}", tmp_path / f"{number}again"
        save(host, first)
        again(host, first, second)
        assert difference(second, first) is None
        restore(host, second)
    last = tmp_path / "last"
    save(host, last)
    assert difference(last, second) is not None
    nothing_is_left(host)


def test_linux_saved_here(xsave_home, micro_linux, tmp_path):
    """A Linux that this host booted and saved; the root of its linear p2m is named by pfn."""
    kernel, ramdisk = map(str, micro_linux)
    host = add_host("a", 64 * MIB, seed=3)
    cmdline = "console=hvc0 rdinit=/init quiet seed=3 pages=20"
    create(host, kernel=kernel, ramdisk=ramdisk, cmdline=cmdline, memory_bytes=32 * MIB)
    wait_for(lambda: "TICK 1 " in console(host), 60)
    save(host, tmp_path / "first")
    again(host, tmp_path / "first", tmp_path / "second")
    assert difference(tmp_path / "second", tmp_path / "first") is None
    pages = Pages(tmp_path / "first")
    assert pages.types[pages.p2m_root_pfn] & 7 == PageType.L4TAB
    nothing_is_left(host)


def test_what_a_restored_guest_finds(host, builtin_image):
    """In start_info, at the mfn in rdx: its own size, the address of this host's shared_info,
    rings that are its own frames at the pfns the image named, and their new event channels."""
    restore(host, builtin_image, paused=True)
    image = Pages(builtin_image)
    before = StartInfo.from_buffer_copy(image.pages[image.start_info_pfn].tobytes())
    with host.find("g") as domctl:
        context = VcpuGuestContext.from_buffer_copy(domctl.vcpus()[0].context)
        page = host.machine.pages[context.user_regs.rdx].tobytes()
        info, m2p = StartInfo.from_buffer_copy(page), host.machine.m2p
        assert m2p[context.user_regs.rdx] == image.start_info_pfn
        assert info.nr_pages == image.types.size
        assert info.shared_info == domctl.state().shared_info_mfn << 12
        assert (m2p[info.store_mfn], m2p[info.console_mfn]) == (
            before.store_mfn,
            before.console_mfn,
        )
        assert domctl.owned(np.array([info.store_mfn, info.console_mfn], np.uint64)).all()
    assert info.store_evtchn
    assert info.console_evtchn
    assert info.store_evtchn != info.console_evtchn


class Pages:
    """A PV image's last word on every pfn: types (n,) u8 and pages (n, 4096) u8."""

    def __init__(self, path):
        self.p2m_pfns = np.empty(0, np.uint64)
        for item in StreamDecoder(reader(path.read_bytes())):
            value = item.value
            if isinstance(value, libxc.X86PvP2mFrames):
                self.p2m_pfns = value.pfns
                self.types = np.full(value.end_pfn + 1, PageType.XTAB, np.uint8)
                self.pages = np.zeros((value.end_pfn + 1, 4096), np.uint8)
            elif isinstance(value, PageBatch):
                self.types[value.pfns] = value.types
                self.pages[value.pfns[value.has_data]] = value.pages
            elif isinstance(value, libxc.SharedInfo):
                shared = SharedInfo.from_buffer_copy(value.content)
                self.p2m_root_pfn = shared.arch.p2m_cr3 >> 12
            elif isinstance(value, libxc.X86PvVcpuBasic) and value.vcpu_id == 0:
                context = VcpuGuestContext.from_buffer_copy(value.context)
                self.start_info_pfn = context.user_regs.rdx


@pytest.mark.parametrize(
    "name",
    [
        "pv-micro-1cpu.img",
        "pv-micro-1cpu-qemu64.img",
        "pv-micro-1cpu-p.img",
        "pv-micro-migrate.stdin",
        "pv-debian-1cpu-A.img",
        "pv-debian-1cpu-qemu64.img",
    ],
)
def test_real_image(xsave_home, xen_image, tmp_path, name):
    """What a real Xen saved and we write again has every page type, every pin, and every page
    but those of the p2m and start_info, which hold the sender's mfns."""
    host = add_host("a", 256 * MIB, seed=4)
    image = xen_image(name)
    again(host, image, tmp_path / "again")
    before, after = Pages(image), Pages(tmp_path / "again")
    assert (before.types == after.types).all()
    assert np.count_nonzero(after.types >= PageType.L1TAB_PINNED) > 0
    differ = (before.pages != after.pages).any(axis=1)
    expected = set(before.p2m_pfns.tolist()) | {before.start_info_pfn}
    assert set(np.flatnonzero(differ).tolist()) <= expected
    again(host, tmp_path / "again", tmp_path / "third")
    assert difference(tmp_path / "third", tmp_path / "again") is None
    nothing_is_left(host)


@pytest.mark.parametrize("where", ["page", "table", "type"])
def test_a_changed_guest_is_not_the_same(host, builtin_image, tmp_path, where):
    """The comparison is one: one byte of one page, one bit of one table entry, one pin taken
    away, each makes another image."""
    restore(host, builtin_image, paused=True)
    machine = host.machine
    with host.find("g") as domctl:
        mine = machine.owner == domctl.domid
    if where == "page":
        mfns = np.flatnonzero(mine)
        untouched = mfns[~machine.resident(mfns)]
        machine.pages[untouched[40], 4095] ^= 1
    elif where == "table":
        l1 = np.flatnonzero(mine & (machine.page_type == 1))
        machine.mem[l1[3], 511] ^= np.uint64(1 << 10)
    else:
        machine.pinned[np.flatnonzero(mine & (machine.pinned != 0))[0]] = 0
    save(host, tmp_path / "changed")
    assert difference(tmp_path / "changed", builtin_image) is not None
    nothing_is_left(host)
