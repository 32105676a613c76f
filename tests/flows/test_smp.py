"""Guests with two vCPUs: Linux booted here, and one that a real Xen saved."""

from __future__ import annotations

import pytest

from tests.flows.flow import (
    MIB,
    console,
    create,
    destroy,
    hashes,
    nothing_is_left,
    restore,
    save,
    ticks,
    wait_for,
    wait_for_tick,
)
from xsave.host.channel import open_source
from xsave.image.libxc import X86PvVcpuBasic
from xsave.image.stream import StreamDecoder
from xsave.image.verify import verify
from xsave.public import VcpuGuestContext

CMDLINE = "console=hvc0 rdinit=/init quiet seed=9 pages=16"
SECONDS = 60


def contexts(path):
    """Return {vCPU: its context} of an image."""
    with open_source(str(path)) as source:
        items = [item.value for item in StreamDecoder(source.read)]
    return {
        value.vcpu_id: VcpuGuestContext.from_buffer_copy(value.context)
        for value in items
        if isinstance(value, X86PvVcpuBasic)
    }


def errors(path):
    """Return what `image verify` calls an error."""
    with open_source(str(path)) as source:
        return [finding for finding in verify(source.read) if finding.severity == "error"]


@pytest.mark.slow
def test_linux_boots_with_two_and_goes_on_with_two(host, micro_linux, tmp_path):
    """Both vCPUs come up; the image holds both, each with its own stack and GDT, and is sound;
    restored, the guest counts on with the same hash and can be saved again."""
    kernel, ramdisk = map(str, micro_linux)
    create(host, kernel=kernel, ramdisk=ramdisk, cmdline=CMDLINE, memory_bytes=32 * MIB, vcpus=2)
    wait_for(lambda: max(ticks(console(host)), default=0) > 1, SECONDS)
    before = console(host)
    save(host, tmp_path / "img")
    first, second = contexts(tmp_path / "img").values()
    assert first.user_regs.rsp != second.user_regs.rsp
    assert first.gdt_frames[0] != second.gdt_frames[0]
    assert errors(tmp_path / "img") == []
    restore(host, tmp_path / "img")
    text = wait_for_tick(host, after=max(ticks(before)) + 1)
    assert hashes(text) == hashes(before)
    save(host, tmp_path / "again")
    assert set(contexts(tmp_path / "again")) == {0, 1}
    nothing_is_left(host)


def test_a_real_guest_with_two_goes_on(host, xen_image, tmp_path):
    """pv-micro-2cpu said TICK 4 on a real Xen (its memory's hash is written beside it): here it
    says 5 and 6; saved and restored again, it goes on from there."""
    restore(host, xen_image("pv-micro-2cpu.img"), name="g", cpu_mismatch="allow")
    text = wait_for_tick(host, after=5)
    assert ticks(text)[:2] == [5, 6]
    assert hashes(text) == {"9f312d8261cdbfe8"}
    save(host, tmp_path / "img")
    restore(host, tmp_path / "img", cpu_mismatch="allow", name="g")
    wait_for_tick(host, after=6)
    destroy(host)
    nothing_is_left(host)


def test_paused_and_saved_again_with_two(host, xen_image, tmp_path):
    """Both contexts of a guest that never ran come out of a save as they went in."""
    restore(host, xen_image("pv-micro-2cpu.img"), name="g", cpu_mismatch="allow", paused=True)
    save(host, tmp_path / "one")
    restore(host, tmp_path / "one", name="g", cpu_mismatch="allow", paused=True)
    save(host, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    was, now = contexts(xen_image("pv-micro-2cpu.img")), contexts(tmp_path / "one")
    for vcpu_id in (0, 1):
        assert now[vcpu_id].user_regs.rip == was[vcpu_id].user_regs.rip
        assert now[vcpu_id].ctrlreg[3] == was[vcpu_id].ctrlreg[3]
        assert bytes(now[vcpu_id].trap_ctxt) == bytes(was[vcpu_id].trap_ctxt)
