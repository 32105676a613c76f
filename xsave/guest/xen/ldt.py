"""Local descriptor tables: a shadow of each vCPU's, page by page as the CPU asks for them.

A guest names its LDT by an address of its own and a number of entries (MMUEXT_SET_LDT). The CPU
reads it in Xen's part of the address space, where nothing is mapped at first: a descriptor that is
needed faults, the guest's page is found in its tables, checked and typed as one of segment
descriptors, so that nobody can write to it any more, and mapped there. All of a vCPU's pages are
given back when it takes another LDT. Mirrors pv_map_ldt_shadow_page and pv_destroy_ldt of
xen/arch/x86/pv/.
"""

from __future__ import annotations

from xsave.frames import PAGE_SHIFT, PTE_ACCESSED, PTE_DIRTY, PTE_PRESENT, PTE_RW
from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.guestmem import is_guest_address
from xsave.guest.xen.pagetable import PageTables
from xsave.guest.xen.pagetypes import PGT_SEG_DESC

MAX_ENTRIES = 8192
_PAGES = MAX_ENTRIES * 8 >> PAGE_SHIFT
#: Supervisor only, as for the GDT: the CPU reads it, the guest does not write it.
_XEN_PTE = PTE_PRESENT | PTE_RW | PTE_ACCESSED | PTE_DIRTY


def is_valid(address: int, entries: int) -> bool:
    """True if Xen takes this for an LDT; none at all, of 0 entries, is one."""
    return not entries or (
        entries <= MAX_ENTRIES and not address & 0xFFF and is_guest_address(address)
    )


class Ldts:
    """The LDTs of a domain's vCPUs, seen by the CPU at `area`: _PAGES pages for each."""

    def __init__(self, tables: PageTables, table: int, area: int) -> None:
        """table: the frame of the L1 table that maps `area`."""
        self._tables = tables
        self._row = table << 9
        self._area = area

    def base(self, vcpu: Vcpu) -> int:
        """Where the CPU finds a vCPU's LDT."""
        return self._area + vcpu.id * (_PAGES << PAGE_SHIFT)

    def set(self, vcpu: Vcpu, address: int, entries: int) -> None:
        """Have the vCPU use another LDT, for which is_valid."""
        self._drop(vcpu)
        vcpu.context.ldt_base, vcpu.context.ldt_ents = address, entries

    def _drop(self, vcpu: Vcpu) -> None:
        tables = self._tables
        first = self._row + vcpu.id * _PAGES
        for slot in range(first, first + _PAGES):
            if tables.q[slot]:
                tables.put_type(tables.q[slot] >> PAGE_SHIFT)
                tables.q[slot] = 0
                tables.stale_tlb = True

    def fault(self, vcpu: Vcpu, address: int) -> int | None:
        """A page fault at this address: None if it has nothing to do with the vCPU's LDT, 0 if the
        page is there now, else the address in the guest at which nothing usable is."""
        offset = address - self.base(vcpu)
        if not 0 <= offset < vcpu.context.ldt_ents * 8:
            return None
        return 0 if self._map(vcpu, offset >> PAGE_SHIFT) else vcpu.context.ldt_base + offset

    def _map(self, vcpu: Vcpu, page: int) -> bool:
        tables, context = self._tables, vcpu.context
        slot = self._row + vcpu.id * _PAGES + page
        if tables.q[slot]:
            return True
        maddr = tables.walk(context.ctrlreg[3] >> 12, context.ldt_base + (page << PAGE_SHIFT))
        if maddr < 0 or tables.get_type(maddr >> PAGE_SHIFT, PGT_SEG_DESC):
            return False
        tables.q[slot] = maddr & ~0xFFF | _XEN_PTE
        return True

    def descriptor(self, vcpu: Vcpu, index: int) -> int:
        """Return an entry of the vCPU's LDT, 0 where there is none."""
        if index >= vcpu.context.ldt_ents or not self._map(vcpu, index >> 9):
            return 0
        frame = self._tables.q[self._row + vcpu.id * _PAGES + (index >> 9)] >> PAGE_SHIFT
        return self._tables.q[(frame << 9) + (index & 511)]
