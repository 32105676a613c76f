"""L1 tables as wholes: the references of their entries are taken and given back, all at once.

That is most of what there is to validate when a guest is built or continued, and numpy's. Mirrors
alloc_l1_table and free_l1_table of xen/arch/x86/mm.c.
"""

from __future__ import annotations

import errno

import numpy as np

from xsave.frames import PAGE_SHIFT, PTE_FRAME_MASK, PTE_PRESENT, PTE_RW, PTE_USER
from xsave.guest.xen.machine import Machine
from xsave.guest.xen.pagetypes import (
    DISALLOWED,
    ONE,
    PGT_L1,
    PGT_NONE,
    PGT_WRITABLE,
    PGT_XEN,
    targets_of,
)

#: What INVALID_MFN looks like in an entry.
_NO_FRAME = PTE_FRAME_MASK >> PAGE_SHIFT


class L1Tables:
    """Those of one domain. Their own types and counts are the caller's."""

    def __init__(self, machine: Machine, domid: int) -> None:
        self._machine = machine
        self._domid = domid
        self._nr_frames = machine.nr_frames

    def validate(self, mfns: int | np.ndarray) -> int:
        """Take the references of all entries of one table, or of several at once; all or none."""
        m = self._machine
        rows = m.mem[mfns]
        present = (rows & PTE_PRESENT) != 0
        entries = rows[present]
        if not entries.size:
            return 0
        targets = targets_of(entries)
        if rc := self._refusal(entries, targets):
            return rc
        common = int(np.bitwise_and.reduce(entries))
        writable = targets if common & PTE_RW else targets[(entries & PTE_RW) != 0]
        np.add.at(m.type_count, writable, ONE)
        m.page_type[writable] = PGT_WRITABLE
        np.add.at(m.refs, targets, ONE)
        if not common & PTE_USER:  # of a restored guest all have it
            rows[present] = entries | np.uint64(PTE_USER)
            m.mem[mfns] = rows
        return 0

    def _refusal(self, entries: np.ndarray, targets: np.ndarray) -> int:
        """Return why the first of these L1 entries (n,) that is wrong is so, 0 if all are right."""
        m = self._machine
        some = int(np.bitwise_or.reduce(entries))
        if not some & DISALLOWED[PGT_L1] and targets.max() < self._nr_frames:  # as good as always
            types = m.page_type.take(targets)
            busy = (types != PGT_WRITABLE) & (m.type_count.take(targets) != 0)
            busy &= (entries & PTE_RW) != 0
            busy |= types == PGT_XEN
            busy |= m.owner.take(targets) != self._domid
            if not busy.any():
                return 0
        flags = (entries & np.uint64(DISALLOWED[PGT_L1])) != 0
        beyond = targets >= self._nr_frames
        if beyond.any():
            targets = np.where(beyond, 0, targets)
        strange = (m.owner[targets] != self._domid) | (m.page_type[targets] == PGT_XEN)
        busy = (m.page_type[targets] != PGT_WRITABLE) & (m.type_count[targets] != 0)
        busy &= (entries & PTE_RW) != 0
        wrong = flags | beyond | strange | busy
        if not wrong.any():
            return 0
        first = int(wrong.argmax())
        if flags[first]:
            return -errno.EINVAL
        return self.no_page(int(entries[first] & np.uint64(PTE_FRAME_MASK)) >> PAGE_SHIFT)

    def no_page(self, mfn: int) -> int:
        """The error of an L1 entry that names a frame it may not (get_page_from_l1e): no memory,
        another's, or one that is used as something else."""
        if mfn < self._nr_frames:
            return -errno.EBUSY
        return -errno.EINVAL if mfn == _NO_FRAME else -errno.EPERM

    def release(self, mfn: int) -> None:
        """Give back the references of all entries of a table."""
        m = self._machine
        entries = m.mem[mfn]
        entries = entries[(entries & PTE_PRESENT) != 0]
        targets = targets_of(entries)
        writable = targets[(entries & PTE_RW) != 0]
        np.subtract.at(m.refs, targets, ONE)
        np.subtract.at(m.type_count, writable, ONE)
        m.page_type[writable[m.type_count[writable] == 0]] = PGT_NONE
