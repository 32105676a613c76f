"""A guest that asks for anything, beside one that must not notice.

The attacker is the built-in kernel at its start of day, made anew for each example; the victim
and Xen's own frames are looked at again afterwards.
"""

from __future__ import annotations

import struct
from collections import Counter

import numpy as np

from tests.guest.pagetable_model import recount
from tests.guest.rig import MIB, Guest, build_guest
from xsave.frames import INVALID_M2P_ENTRY
from xsave.guest.xen.cpuregs import CR3
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.machine import DOMID_FREE, M2P_FIRST_FRAME
from xsave.guest.xen.pagetypes import PGT_L1, PGT_L4, PGT_WRITABLE, PGT_XEN

ATTACKER, VICTIM = 1, 2
BASE = 0xFFFF_FFFF_8000_0000
NR_PAGES = 2 * MIB
SCRATCH_PFN = 500  # far behind all the builder placed
SCRATCH = BASE + (SCRATCH_PFN << 12)
M64 = (1 << 64) - 1


class NoCpu:
    """Stands for the emulated CPU: a hypercall may stop it, or have it look at memory again. All it
    has is its registers."""

    def __init__(self, hv):
        self.q = memoryview(bytearray(4096)).cast("Q")
        self.q[CR3] = hv.vcpu.cr3

    def stop(self):
        """End the run."""

    def load_cr3(self, value):
        """Flush."""
        self.q[CR3] = value

    def flush_page(self, address):
        """Flush one page."""
        assert 0 <= address < 1 << 64

    def load_ldt(self, base, entries):
        """Use another LDT."""
        assert 0 <= base < 1 << 64
        assert 0 <= entries <= 8192

    def forget_code(self):
        """Drop translations."""


def attack(machine) -> Hypervisor:
    """A fresh attacker with a second vCPU to bring up; its CPU is only a stand-in."""
    hv = build_guest(machine, ATTACKER, max_pages=NR_PAGES, nr_vcpus=2)
    assert hv.domain.grants.setup(1) == 0
    hv.cpu = NoCpu(hv)
    hv.q = hv.cpu.q
    return hv


def mfn_of_page(machine, page: memoryview) -> int:
    """The frame that a view of machine memory shows."""
    at = np.frombuffer(page, np.uint8).ctypes.data - machine.pages.ctypes.data
    return at >> 12


class Arena:
    """A machine, its victim, and what must stay as it is."""

    def __init__(self, machine) -> None:
        self.machine = machine
        self.victim = Guest(machine, domid=VICTIM)
        for page in range(self.victim.nr):
            self.victim.poke(page, 0, bytes([page + 1]) * 4096)
        self.before = self.seen()

    def seen(self) -> list:
        """The victim's frames and Xen's, with all that is known of them."""
        machine = self.machine
        victims = np.flatnonzero(machine.owner == VICTIM)
        frames = np.concatenate((np.arange(1, M2P_FIRST_FRAME), victims))
        columns = (machine.owner, machine.page_type, machine.type_count, machine.refs)
        columns += (machine.pinned, machine.m2p)
        return [victims.tolist(), machine.pages[frames].tobytes()] + [
            column[frames].tolist() for column in columns
        ]

    def check(self, hv: Hypervisor) -> None:
        """The victim is untouched, free frames are unknown to all, and the attacker's counts are
        what its tables and Xen's uses of its frames add up to."""
        machine = self.machine
        assert self.seen() == self.before
        free = machine.owner == DOMID_FREE
        assert (machine.m2p[free] == INVALID_M2P_ENTRY).all()
        assert not machine.type_count[free].any()
        own = np.flatnonzero((machine.owner == ATTACKER) & (machine.page_type != PGT_XEN))
        uses, refs = recount(machine, set(own.tolist()))
        uses += self.held(hv)
        assert {int(m): int(machine.type_count[m]) for m in own if machine.type_count[m]} == uses
        assert {int(m): int(machine.refs[m]) for m in own if machine.refs[m]} == refs
        assert hv.domain.nr_pages() <= hv.domain.max_pages

    def held(self, hv: Hypervisor) -> Counter:
        """Uses of the attacker's frames that are in none of its tables: frame -> how often."""
        domain, machine = hv.domain, self.machine
        held = np.flatnonzero((machine.pinned != 0) & (machine.owner == ATTACKER)).tolist()
        for vcpu in domain.vcpus:
            context = vcpu.context
            held += [context.ctrlreg[i] >> 12 for i in (1, 3) if context.ctrlreg[i]]
            held += list(context.gdt_frames)[: -(-context.gdt_ents // 512)]
            held += [vcpu.info_mfn] if vcpu.info_mfn is not None else []
        held += [queues.control >> 12 for queues in domain.events._fifo.values()]
        held += [address >> 12 for address in domain.events._array]
        held += [mfn_of_page(machine, p) for p in (domain.store_page, domain.console.page)]
        return Counter([*held, *domain.grants.frames, domain.shared_info_mfn])

    def frames(self, hv: Hypervisor) -> list[int]:
        """One frame of every kind there is, and some that are none."""
        machine, domain = self.machine, hv.domain
        own = np.flatnonzero(machine.owner == ATTACKER)
        by_pfn = {int(machine.m2p[m]): int(m) for m in own if machine.m2p[m] < NR_PAGES}
        kinds = [
            own[machine.page_type[own] == kind] for kind in (PGT_L1, 2, 3, PGT_L4, PGT_WRITABLE)
        ]
        return [
            *(int(kind[0]) for kind in kinds),
            *(by_pfn[pfn] for pfn in range(SCRATCH_PFN, SCRATCH_PFN + 8)),
            mfn_of_page(machine, domain.store_page),
            mfn_of_page(machine, domain.console.page),
            domain.shared_info_mfn,
            domain.scratch_mfn,
            *domain.grants.frames,
            domain._l1,
            self.victim.frames[3],
            self.victim.l1,
            self.victim.l4,
            0,
            1,
            M2P_FIRST_FRAME,
            int(np.flatnonzero(machine.owner == DOMID_FREE)[0]),
            machine.nr_frames,
            (1 << 52) - 1,
        ]


NR_FRAMES = 27


def fill_scratch(hv: Hypervisor, words: list[int]) -> None:
    """Write words to SCRATCH, if the guest can still write there itself."""
    at = hv.tables.walk(hv.vcpu.cr3 >> 12, SCRATCH, write=True)
    if at >= 0:
        packed = struct.pack(f"<{len(words)}Q", *words)
        hv.domain.machine.map[at : at + len(packed)] = packed
