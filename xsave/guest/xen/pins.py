"""Many page tables pinned and unpinned at once, as who builds a domain needs it: a guest that
migrates stands still meanwhile.

All tables of a level are looked at together, the lowest level first, so that the entries of those
above name tables in use and nothing is left to be validated one by one. What cannot be done so is
left alone: PageTables.pin goes down into whatever such a table names, and says what is wrong. The
guest does not run yet: no translation of it can be stale.
"""

from __future__ import annotations

import numpy as np

from xsave.frames import PTE_PRESENT, PTE_USER, XEN_L4_SLOTS
from xsave.guest.xen.pagetable import PageTables
from xsave.guest.xen.pagetypes import DISALLOWED, ONE, PGT_L1, PGT_L4, PGT_XEN, targets_of

#: Tables that are looked at together: some megabytes.
_BATCH = 256
_XEN_FIRST, _XEN_END = XEN_L4_SLOTS[0], XEN_L4_SLOTS[1] + 1


class Pins:
    """Those of one domain's tables."""

    def __init__(self, tables: PageTables) -> None:
        self._tables = tables
        self._machine = tables.machine

    def pin_levels(self, mfns: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """Pin different frames mfns (n,) u64 as tables of these levels (n,) u8, those that can be
        so at once; return which, (n,) bool."""
        pinned = np.zeros(mfns.size, bool)
        for level in range(PGT_L1, PGT_L4 + 1):
            which = np.flatnonzero(levels == level)
            for first in range(0, which.size, _BATCH):
                some = which[first : first + _BATCH]
                pinned[some] = self.pin(mfns[some], level)
        return pinned

    def pin(self, mfns: np.ndarray, level: int) -> np.ndarray:
        """Pin those that are in no use and whose entries name nothing but tables in use; of level 1
        all that are in no use, or none. Return which, (n,) bool."""
        if level == PGT_L1:
            held = self._tables.hold_new(mfns.tolist())
            new = np.isin(mfns, np.array(held, np.uint64))
        else:
            new = self._take(mfns, level)
        self._machine.pinned[mfns[new].view(np.int64)] = 1
        return new

    def pin_l1s(self, mfns: np.ndarray) -> np.ndarray:
        """Pin different frames as L1 tables, those that can be; return which, (n,) bool."""
        pinned = self.pin(mfns, PGT_L1)
        for i in np.flatnonzero(~pinned).tolist():
            pinned[i] = self._tables.pin(int(mfns[i]), PGT_L1) == 0
        return pinned

    def _take(self, mfns: np.ndarray, level: int) -> np.ndarray:
        """Take the first reference on each of these upper tables, and those of their entries."""
        m, tables = self._machine, self._tables
        new, frames = self._owned(mfns)
        new &= m.type_count[frames] == 0
        rows = m.mem[frames]
        present = (rows & np.uint64(PTE_PRESENT)) != 0
        if level == PGT_L4:
            present[:, _XEN_FIRST:_XEN_END] = False
        which, slots = np.nonzero(present)
        entries = rows[which, slots]
        in_use, targets = self._owned(targets_of(entries).view(np.uint64))
        in_use &= (entries & np.uint64(DISALLOWED[level])) == 0
        in_use &= m.page_type[targets] == level - 1
        new[which[~in_use]] = False
        taken = new[which]
        np.add.at(m.type_count, targets[taken], ONE)
        np.add.at(m.refs, targets[taken], ONE)
        m.mem[frames[which[taken]], slots[taken]] = entries[taken] | np.uint64(PTE_USER)
        frames = frames[new]
        if level == PGT_L4:
            xen = [tables.xen_l4_slots.get(slot, 0) for slot in range(_XEN_FIRST, _XEN_END)]
            m.mem[frames, _XEN_FIRST:_XEN_END] = np.array(xen, np.uint64)
        m.page_type[frames], m.type_count[frames] = level, ONE
        m.mark(frames)
        return new

    def _owned(self, mfns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of these frames the guest may name, (n,) bool, and all, those that the
        machine has not as 0, i64."""
        m = self._machine
        inside = mfns < m.nr_frames
        frames = np.where(inside, mfns, 0).view(np.int64)
        owned = inside & (m.owner[frames] == self._tables.domid) & (m.page_type[frames] != PGT_XEN)
        return owned, frames

    def unpin_used(self, mfns: np.ndarray) -> np.ndarray:
        """Unpin those of these frames, all different, that are pinned and stay in use all the
        same, at once; return the others."""
        m = self._machine
        used, frames = self._owned(mfns)
        used &= (m.pinned[frames] != 0) & (m.type_count[frames] > 1)
        frames = frames[used]
        m.pinned[frames] = 0
        m.type_count[frames] -= ONE
        m.mark(frames)
        self._tables.unflushed = self._tables.unflushed or frames.size > 0
        return mfns[~used]
