"""The TLB of a deterministic guest: what the guest sees of it does not follow the host's clock."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.guest.rig import MIB, Guest
from xsave.frames import PTE_ACCESSED
from xsave.guest.xen.cpuregs import UnsupportedEmulator
from xsave.guest.xen.domain import HYPERVISOR_VIRT_START
from xsave.guest.xen.tlb import ENTRIES, Tlb

FIRST, NR = 20, 470
#: As long as the emulator remembers at least how much of the TLB was used, and more.
A_WINDOW_S = 0.12
#: mov al, [rdi]; add rdi, 4096; dec rcx; jnz
LOOP = bytes.fromhex("8a07 4881c700100000 48ffc9 75f2")


@pytest.fixture
def guest(machines):
    guest = Guest(machines.make(16 * MIB), nr=FIRST + NR)
    guest.power_on()
    return guest


def sweep(guest, nr):
    """Have the guest read one byte of each of so many pages."""
    assert guest.run(LOOP, rdi=guest.va(FIRST), rcx=nr) == guest.va(0, len(LOOP))


def flush(guest, pause_s=0.0):
    time.sleep(pause_s)
    guest.hv.cpu.load_cr3(guest.vcpu.cr3)


def missed_again(guest, nr):
    """Read pages, take their accessed bits away, read them again: which have them again."""
    entries = guest.machine.mem[guest.l1, FIRST : FIRST + nr]
    sweep(guest, nr)
    entries &= ~np.uint64(PTE_ACCESSED)
    sweep(guest, nr)
    return ((entries & np.uint64(PTE_ACCESSED)) != 0).tolist()


def test_real_time_is_not_seen(guest):
    """A guest that needs much of the TLB, then little, then much: whatever the time in between,
    the same accessed bits are set again. (Some are, some are not: it does see its TLB.)"""
    seen = []
    for pause_s in (0.0, A_WINDOW_S, 0.0):
        for _ in range(4):
            sweep(guest, NR)
            flush(guest)
        for _ in range(2):
            sweep(guest, 5)
            flush(guest, pause_s)
        seen.append(missed_again(guest, NR - 150))
        flush(guest)
    assert any(seen[0])
    assert not all(seen[0])
    assert seen[0] == seen[1] == seen[2]


def test_no_flush_changes_the_size(guest):
    """Not that of all, not that of one page, which is all if a large one was used, and not what a
    vCPU begins with."""
    cpu = guest.hv.cpu
    assert cpu._tlb.entries() == [ENTRIES] * 3
    for again in (
        lambda: flush(guest),
        lambda: cpu.flush_page(HYPERVISOR_VIRT_START),
        lambda: guest.vcpu.load_registers(cpu, guest.domain.gdt_base(guest.vcpu)),
    ):
        sweep(guest, NR)
        guest.run(b"\x8a\x07", rdi=HYPERVISOR_VIRT_START)  # a page of 2 MiB
        again()
        assert cpu._tlb.entries() == [ENTRIES] * 3


def test_another_layout_is_noticed(guest):
    """An address that is none of an engine's, or of one that has run: nothing is written."""
    cpu, state = guest.hv.cpu._locate()
    assert cpu < state
    sweep(guest, NR)
    for address in (state, state + 16, cpu + 4096):
        with pytest.raises(UnsupportedEmulator):
            Tlb(address, fixed=True)
