"""Page types and their counts: what keeps a PV guest inside its own frames.

A guest's page tables hold machine frame numbers and the emulator's MMU walks them as they are,
so every entry is checked before it takes effect, with Xen's rules (xen/arch/x86/mm.c):

* a frame has one type at a time (L1..L4 table, writable, segment descriptors) and a count of
  its uses as that type; it changes type only at count 0;
* a present entry may name only a frame the domain owns; a writable L1 entry takes a reference
  of type writable on it, an entry of an L2..L4 table takes one of type L1..L3;
* so no page table is ever mapped writable, and every table in use has been validated.

A whole L1 table is validated with a few numpy operations; a single entry (mmu_update) with plain
integers through memoryviews, which beat numpy scalars by far.

Errors are Xen's negative errno values, returned, as the guest gets them.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Collection

import numpy as np

from xsave.frames import (
    PAGE_SHIFT,
    PTE_FRAME_MASK,
    PTE_PRESENT,
    PTE_PSE,
    PTE_RW,
    PTE_USER,
    XEN_L4_SLOTS,
)
from xsave.guest.xen.l1tables import L1Tables
from xsave.guest.xen.machine import Machine
from xsave.guest.xen.pagetypes import (
    DISALLOWED,
    ONE,
    PGT_DYING,
    PGT_L1,
    PGT_L2,
    PGT_L4,
    PGT_NONE,
    PGT_SEG_DESC,
    PGT_WRITABLE,
    PGT_XEN,
    targets_of,
)
from xsave.guest.xen.progress import ERESTART, Progress

_AD = 0x60
#: From so many on, forgetting everything is no dearer.
_MAX_STALE_PAGES = 16
#: So many entries are quicker looked at together than one by one.
_MANY_ENTRIES = 8
_EMPTY = bytes(1 << PAGE_SHIFT)
_NO_LINKS = np.empty(0, np.int64), np.empty(0, np.uint64)
_DESCRIPTOR_DPL = 3 << 45


def fix_descriptor(descriptor: int) -> int | None:
    """Return a segment descriptor as a guest may have it, None for one it may not (Xen's
    check_descriptor): any code or data, but of user privilege; of the others none that does
    something. (Xen takes call gates and emulates them.)"""
    if not descriptor >> 47 & 1:
        return descriptor
    if descriptor >> 44 & 1:
        return descriptor | _DESCRIPTOR_DPL
    return None if descriptor >> 40 & 15 else descriptor


class PageTables:
    """The types and counts of one domain's frames, and the only way to change its tables.

    When an entry that was present changes, the guest itself says when the old translation must
    be gone, as on Xen, and `unflushed` is noted. A stale writable translation of a new page table
    would be an escape: so `stale_tlb` is set as soon as a frame becomes anything but writable
    while something is unflushed, and the caller flushes before the guest runs again. `stale_pages`
    are single addresses to flush; few, or it is all.
    """

    def __init__(self, machine: Machine, domid: int, xen_l4_slots: dict[int, int]) -> None:
        self.machine = machine
        self.domid = domid
        self.xen_l4_slots = xen_l4_slots  # slot -> PTE that Xen puts into every L4
        self.q = memoryview(machine.map).cast("Q")
        self.owner = memoryview(machine.owner.data)
        self.ptype = memoryview(machine.page_type.data)
        self.count = memoryview(machine.type_count.data)
        self.refs = memoryview(machine.refs.data)
        self.pinned = memoryview(machine.pinned.data)
        self.nr_frames = machine.nr_frames
        self.unflushed_flag = (ctypes.c_uint8 * 1)()  # fastpath.py shares it
        self.stale_tlb = False
        self.stale_pages: list[int] = []
        self.progress = Progress()
        self._l1s = L1Tables(machine, domid)

    @property
    def unflushed(self) -> bool:
        """True if an entry that was present has changed since the TLB was flushed."""
        return bool(self.unflushed_flag[0])

    @unflushed.setter
    def unflushed(self, changed: bool) -> None:
        self.unflushed_flag[0] = changed

    @property
    def idle(self) -> bool:
        """True if nothing of an earlier request is left to be done or to be flushed."""
        progress = self.progress
        return not (self.stale_tlb or self.stale_pages or progress.dying or progress.kept)

    def flush_page(self, address: int) -> None:
        """Ask for the translation of one page to be forgotten before the guest runs again."""
        if len(self.stale_pages) < _MAX_STALE_PAGES:
            self.stale_pages.append(address)
        else:
            self.stale_tlb = True

    def owned(self, mfn: int) -> bool:
        """True if the guest may name this frame at all."""
        return mfn < self.nr_frames and self.owner[mfn] == self.domid and self.ptype[mfn] != PGT_XEN

    def is_upper(self, mfn: int) -> bool:
        """True for an L2, L3 or L4 table, an entry of which may lead to any number of others."""
        return self.owned(mfn) and PGT_L2 <= self.ptype[mfn] <= PGT_L4

    def mark(self, mfn: int) -> None:
        """Of this frame something changes that Machine.marked is there for."""
        if (marked := self.machine.marked) is not None:
            marked.add(mfn)

    # -- type references ---

    def get_type(self, mfn: int, want: int) -> int:
        """Take one reference of type `want`; validate the table if it is the first. 0 or -errno:
        -ERESTART if it was preempted in an attempt()."""
        if not self.owned(mfn):
            return -errno.EINVAL
        if self.count[mfn]:
            if self.ptype[mfn] != want:
                return -errno.EINVAL
            self.count[mfn] += 1
            return 0
        if PGT_L2 <= want <= PGT_L4 and self.progress.must_stop():
            return -ERESTART
        self.ptype[mfn] = want
        self.count[mfn] = 1
        if self.unflushed and want != PGT_WRITABLE:
            self.stale_tlb = True
        if PGT_L1 <= want <= PGT_L4:
            self.mark(mfn)
            rc = self._l1s.validate(mfn) if want == PGT_L1 else self._validate_upper(mfn, want)
            if rc:
                self.count[mfn] = 0
                self.ptype[mfn] = PGT_NONE
                return rc
            self.progress.nr_steps += want > PGT_L1
        elif want == PGT_SEG_DESC:
            rc = self._validate_descriptors(mfn)
            if rc:
                self.count[mfn] = 0
                self.ptype[mfn] = PGT_NONE
                return rc
        return 0

    def put_type(self, mfn: int) -> None:
        """Drop one type reference; at zero a table releases all that its entries name."""
        self.count[mfn] -= 1
        if self.count[mfn]:
            return
        was = self.ptype[mfn]
        self.ptype[mfn] = PGT_NONE
        if PGT_L1 <= was <= PGT_L4:
            self.mark(mfn)
        if was == PGT_L1:
            self._l1s.release(mfn)
        elif PGT_L2 <= was <= PGT_L4:
            self.ptype[mfn], self.count[mfn] = PGT_DYING, 1
            self.progress.dying.append((mfn, was))
            if not self.progress.releasing:
                self._release_dying()

    def _release_dying(self) -> None:
        """Give up what dying tables name, and what dies of that, unless preempted."""
        progress = self.progress
        progress.releasing = True
        while progress.dying and not progress.must_stop():
            mfn, level = progress.dying.pop()
            self._release_upper(mfn, level)
            self.ptype[mfn], self.count[mfn] = PGT_NONE, 0
            progress.nr_steps += 1
        progress.releasing = False

    def attempt(self, preempted: Callable[[], bool], request: Callable[[], int]) -> int:
        """Do what remains of earlier requests, then this one, which may be preempted: -ERESTART
        then, and it must be made again. It may also be done and leave something: `unfinished`."""
        progress = self.progress
        progress.preempted, progress.nr_steps = preempted, 0
        try:
            self._release_dying()
            if progress.dying:
                return -ERESTART
            kept, progress.kept = progress.kept, []
            try:
                return request()
            finally:
                for mfn in kept:
                    self.put_type(mfn)
        finally:
            progress.preempted = None

    @property
    def unfinished(self) -> bool:
        """True if a request was done and left something to do before the guest goes on."""
        return bool(self.progress.dying)

    def _hold_l1s(self, entries: list[int]) -> list[int]:
        """Validate the new L1 tables that entries of an L2 name, all at once, as many together
        are cheap; return those that got a reference so. If one is wrong nothing happens: it is
        found when each is taken by itself."""
        return self.hold_new({(entry & PTE_FRAME_MASK) >> PAGE_SHIFT for entry in entries})

    def hold_new(self, mfns: Collection[int]) -> list[int]:
        """Take a reference of type L1 on those of these frames that have none at all, on none
        if one of them is no valid table; return which."""
        new = [mfn for mfn in mfns if self.owned(mfn) and not self.count[mfn]]
        self.stale_tlb = self.stale_tlb or (self.unflushed and bool(new))
        index = np.array(new, np.int64)
        m = self.machine
        m.page_type[index], m.type_count[index] = PGT_L1, 1
        m.mark(index)
        if self._l1s.validate(index):
            m.page_type[index], m.type_count[index] = PGT_NONE, 0
            return []
        return new

    def _links(self, mfn: int, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the slots (n,) of the present entries that are the guest's own, and those."""
        if self.machine.map[mfn << PAGE_SHIFT : (mfn + 1) << PAGE_SHIFT] == _EMPTY:
            return _NO_LINKS  # as most L3 tables of a Linux
        row = self.machine.mem[mfn]
        slots = np.flatnonzero(row & np.uint64(PTE_PRESENT))
        if level == PGT_L4:
            first, last = XEN_L4_SLOTS
            slots = slots[(slots < first) | (slots > last)]
        return slots, row[slots]

    def _validate_upper(self, mfn: int, level: int) -> int:
        rc, held = 0, []
        slots, entries = self._links(mfn, level)
        taken, slots, entries = self._take_used(mfn, slots, entries, level)
        if level == PGT_L2 and entries.size:
            held = self._hold_l1s(entries.tolist())
            more, slots, entries = self._take_used(mfn, slots, entries, level)
            taken += more
        for slot, entry in zip(slots.tolist(), entries.tolist(), strict=True):
            rc = self._take(entry, level)
            if rc:
                break
            taken.append(entry)
            self.q[(mfn << 9) + slot] = entry | PTE_USER
        if rc == -ERESTART:
            self._keep(taken)
        elif rc:
            for entry in taken:
                self._drop(entry, level)
        for table in held:
            self.put_type(table)
        if rc:
            return rc
        if level == PGT_L4:
            first, last = XEN_L4_SLOTS
            for slot in range(first, last + 1):
                self.q[(mfn << 9) + slot] = self.xen_l4_slots.get(slot, 0)
        return 0

    def _take_used(
        self, mfn: int, slots: np.ndarray, entries: np.ndarray, level: int
    ) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Take the references of entries that name tables in use, if there are many, at once.
        Return (entries with references, slots and entries that are left)."""
        if entries.size < _MANY_ENTRIES:
            return [], slots, entries
        targets, m = targets_of(entries), self.machine
        inside = targets < self.nr_frames
        frames = np.where(inside, targets, 0)
        used = inside & (entries & np.uint64(DISALLOWED[level]) == 0)
        used &= (m.owner[frames] == self.domid) & (m.page_type[frames] == level - 1)
        used &= m.type_count[frames] != 0
        frames = frames[used]
        np.add.at(m.type_count, frames, ONE)
        np.add.at(m.refs, frames, ONE)
        m.mem[mfn, slots[used]] = entries[used] | np.uint64(PTE_USER)
        return entries[used].tolist(), slots[~used], entries[~used]

    def _keep(self, entries: list[int]) -> None:
        """The tables these name have been validated: that lasts until the request comes again."""
        for entry in entries:
            target = (entry & PTE_FRAME_MASK) >> PAGE_SHIFT
            self.refs[target] -= 1
            self.progress.kept.append(target)

    def _release_upper(self, mfn: int, level: int) -> None:
        for entry in self._links(mfn, level)[1].tolist():
            self._drop(entry, level)
        if level == PGT_L4:
            first, last = XEN_L4_SLOTS
            for slot in range(first, last + 1):
                self.q[(mfn << 9) + slot] = 0

    def _validate_descriptors(self, mfn: int) -> int:
        """validate_segdesc_page; the page is changed only if all of it is right."""
        row = self.machine.mem[mfn].tolist()
        fixed = [fix_descriptor(descriptor) for descriptor in row]
        if None in fixed:
            return -errno.EINVAL
        if fixed != row:
            self.machine.mem[mfn] = np.array(fixed, np.uint64)
        return 0

    # -- single entries ---

    def _take(self, entry: int, level: int) -> int:
        """Take the references a present entry of a table of this level needs. 0 or -errno."""
        if entry & DISALLOWED[level]:
            return -errno.EINVAL
        target = (entry & PTE_FRAME_MASK) >> PAGE_SHIFT
        if level > PGT_L1:
            if rc := self.get_type(target, level - 1):
                return rc
        elif not self.owned(target) or (entry & PTE_RW and self.get_type(target, PGT_WRITABLE)):
            return self._l1s.no_page(target)
        self.refs[target] += 1
        return 0

    def _drop(self, entry: int, level: int) -> None:
        target = (entry & PTE_FRAME_MASK) >> PAGE_SHIFT
        self.refs[target] -= 1
        if level > PGT_L1 or entry & PTE_RW:
            self.put_type(target)

    def update_entry(self, table: int, slot: int, new: int, preserve_ad: bool = False) -> int:
        """Set one entry of a validated table (mod_lN_entry). 0 or -errno."""
        level = self.ptype[table]
        index = (table << 9) + slot
        old = self.q[index]
        if preserve_ad:
            new |= old & _AD
        if level == PGT_L4 and XEN_L4_SLOTS[0] <= slot <= XEN_L4_SLOTS[1]:
            return -errno.EINVAL
        if new & PTE_PRESENT:
            new |= PTE_USER
            rc = self._take(new, level)
            if rc:
                return rc
        self.q[index] = new
        if old & PTE_PRESENT:
            self._drop(old, level)
            self.unflushed = True
        return 0

    def mmu_update(self, address: int, value: int, preserve_ad: bool = False) -> int:
        """MMU_NORMAL_PT_UPDATE: write 8 bytes at a machine address, checked by the frame's type."""
        table = address >> PAGE_SHIFT
        if not self.owned(table) or address & 7:
            return -errno.EINVAL
        slot = (address & 0xFFF) >> 3
        if self.count[table] and PGT_L1 <= self.ptype[table] <= PGT_L4:
            return self.update_entry(table, slot, value, preserve_ad)
        rc = self.get_type(table, PGT_WRITABLE)
        if rc:
            return rc
        self.q[(table << 9) + slot] = value
        self.put_type(table)
        return 0

    # -- pins ---

    def pin(self, mfn: int, level: int) -> int:
        """MMUEXT_PIN_Ln_TABLE. 0 or -errno."""
        if not self.owned(mfn) or self.pinned[mfn]:
            return -errno.EINVAL
        rc = self.get_type(mfn, level)
        if rc == 0:
            self.pinned[mfn] = 1
            self.mark(mfn)
        return rc

    def unpin(self, mfn: int) -> int:
        """MMUEXT_UNPIN_TABLE. 0 or -errno."""
        if not self.owned(mfn) or not self.pinned[mfn]:
            return -errno.EINVAL
        self.pinned[mfn] = 0
        self.mark(mfn)
        self.put_type(mfn)
        self.unflushed = True
        return 0

    # -- the software walk ---

    def walk(self, l4: int, address: int, write: bool = False) -> int:
        """Return the machine address a guest virtual address maps to, or -1."""
        q = self.q
        need = PTE_PRESENT | PTE_USER | PTE_RW if write else PTE_PRESENT | PTE_USER
        if (address >> 47) not in (0, 0x1FFFF):
            return -1
        # Unrolled: each crossing walks. A frame's address / 8 is where its words begin in q.
        entry = q[l4 << 9 | address >> 39 & 511]
        if entry & need != need:
            return -1
        entry = q[(entry & PTE_FRAME_MASK) >> 3 | address >> 30 & 511]
        if entry & need != need:
            return -1
        if entry & PTE_PSE:
            return (entry & PTE_FRAME_MASK) + (address & ((1 << 30) - 1))
        entry = q[(entry & PTE_FRAME_MASK) >> 3 | address >> 21 & 511]
        if entry & need != need:
            return -1
        if entry & PTE_PSE:
            return (entry & PTE_FRAME_MASK) + (address & ((1 << 21) - 1))
        entry = q[(entry & PTE_FRAME_MASK) >> 3 | address >> 12 & 511]
        if entry & need != need:
            return -1
        return entry & PTE_FRAME_MASK | address & 0xFFF

    def l1_slot(self, l4: int, address: int) -> int:
        """Return the machine address of the L1 entry of a guest virtual address, or -1."""
        table = l4
        if (address >> 47) not in (0, 0x1FFFF):
            return -1
        if XEN_L4_SLOTS[0] <= (address >> 39) & 511 <= XEN_L4_SLOTS[1]:
            return -1
        for shift in (39, 30, 21):
            entry = self.q[(table << 9) + ((address >> shift) & 511)]
            if not entry & PTE_PRESENT:
                return -1
            table = (entry & PTE_FRAME_MASK) >> PAGE_SHIFT
        return (table << PAGE_SHIFT) + ((address >> 12) & 511) * 8
