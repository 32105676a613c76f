"""The page tables of a restore, pfns in their entries becoming mfns again.

All of it at the end, when the last type of every pfn is known; or most of it ahead: while a live
migration's next pages are on their way, level-1 tables whose pages all have frames are localised
in theirs, and pinned, which validates them. What comes again is done again, and nothing but the
time it takes depends on it: a table that is in any way odd is left alone until the end, where the
errors are, and by then the pins that were nobody's are undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np

from xsave.canonical import canonicalise, localise, named_pfns, referenced_pfns
from xsave.errors import ImageError
from xsave.frames import INVALID_P2M_ENTRY, PTE_PSE, PageType
from xsave.guest.xen.domctl import Domctl
from xsave.image.pages import PageBatch
from xsave.placing import Memory, table_levels

_INVALID = np.uint64(INVALID_P2M_ENTRY)
#: Tables that are pinned ahead at once: a millisecond's work or two.
_PIN_BATCH = 64


class Localiser:
    """Works on the tables in one Memory of a domain."""

    def __init__(self, domctl: Domctl, memory: Memory) -> None:
        self._domctl = domctl
        self._memory = memory
        memory.before_renewal = self._forget
        nr_pfns = memory.p2m.size
        self._ahead = np.zeros(nr_pfns, bool)  # pfns of tables localised in their frames
        self._pinned = np.zeros(nr_pfns, bool)
        self._tried = np.zeros(nr_pfns, bool)  # to be pinned

    def _forget(self, pfns: np.ndarray) -> None:
        """These come anew: no table may be in use while it changes."""
        if pfns.size and int(pfns.max()) >= self._ahead.size:
            more = np.zeros(self._memory.p2m.size - self._ahead.size, bool)
            self._ahead = np.append(self._ahead, more)
            self._pinned = np.append(self._pinned, more)
            self._tried = np.append(self._tried, more)
        if self._pinned[pfns].any():
            coming = np.zeros(self._pinned.size, bool)
            coming[pfns] = True
            self._unpin(np.flatnonzero(self._pinned & coming))
        self._ahead[pfns] = self._tried[pfns] = False

    def _unpin(self, pfns: np.ndarray) -> None:
        if pfns.size:
            self._domctl.ask_unpin(self._memory.p2m[pfns])()
            self._pinned[pfns] = False

    def ask_unpin(self) -> Callable[[], object]:
        """Undo what was pinned ahead; return what waits until that is done."""
        pfns = np.flatnonzero(self._pinned)
        return self._domctl.ask_unpin(self._memory.p2m[pfns]) if pfns.size else _nothing

    def work_ahead(self) -> bool:
        """Records are still to come: do a part of what can be done. False if nothing can."""
        if self._localise_ahead():
            return True
        # A guest that has pinned one itself: that one waits for its turn.
        plain = self._memory.types[: self._ahead.size] == PageType.L1TAB
        pfns = np.flatnonzero(self._ahead & plain & ~self._tried)[:_PIN_BATCH]
        if pfns.size:
            self._tried[pfns] = True
            self._pinned[pfns] = self._domctl.pin_l1s(self._memory.p2m[pfns])
        return pfns.size > 0

    def _localise_ahead(self) -> bool:
        memory = self._memory
        levels = table_levels(memory.types[: self._ahead.size])
        pfns = np.flatnonzero((levels == 1) & ~self._ahead)
        pfns = pfns[memory.in_place(pfns)]
        if not pfns.size:
            return False
        tables = memory.read_tables(pfns)
        rows, _, targets = referenced_pfns(tables)
        known = np.zeros(targets.size, bool)
        inside = targets < np.uint64(memory.p2m.size)
        known[inside] = memory.p2m[targets[inside]] != _INVALID
        ready = np.ones(pfns.size, bool)
        ready[rows[~known]] = False
        pfns = pfns[ready]
        memory.write_tables(pfns, localise(tables[ready], memory.p2m))
        self._ahead[pfns] = True
        return pfns.size > 0

    def run(self) -> None:
        """All records came: drop the holes, have all tables localised. Raises ImageError."""
        memory = self._memory
        if (holes := memory.holes()).size:
            self._go_back()
            memory.drop(holes)
        levels = table_levels(memory.types)
        pending = levels != 0
        pending[: self._ahead.size] &= ~self._ahead
        pfns = np.flatnonzero(pending)
        tables = memory.read_tables(pfns)
        targets = named_pfns(tables)
        if (targets >= np.uint64(memory.p2m.size)).any():
            self._refuse_outside(tables, pfns)
        upper = levels[pfns] > 1
        self._check_upper(tables[upper], levels, pfns[upper])
        named = np.zeros(memory.p2m.size, bool)
        named[targets] = True
        memory.populate(np.flatnonzero(named))
        memory.write_tables(pfns, localise(tables, memory.p2m))

    def _go_back(self) -> None:
        """Some frames are to be dropped: tables may name them."""
        self._unpin(np.flatnonzero(self._pinned))
        pfns = np.flatnonzero(self._ahead)
        tables = self._memory.read_tables(pfns)
        levels = np.ones(pfns.size, np.uint8)
        back = canonicalise(tables, levels, self._domctl.machine.m2p, self._memory.p2m)
        self._memory.write_tables(pfns, back.tables)
        self._ahead[:] = False

    def _refuse_outside(self, tables: np.ndarray, pfns: np.ndarray) -> NoReturn:
        """Name the first entry of the tables at pfns that leads out of the p2m."""
        size = self._memory.p2m.size
        rows, slots, targets = referenced_pfns(tables)
        first = np.flatnonzero(targets >= np.uint64(size))[0]
        row, slot = int(rows[first]), int(slots[first])
        found = f"{int(tables[row, slot]):#x}"
        what, expected = "a pfn outside the p2m", f"a pfn below {size:#x}"
        self._refuse_entry(int(pfns[row]), slot, what, expected, found)

    def _check_upper(self, tables: np.ndarray, levels: np.ndarray, pfns: np.ndarray) -> None:
        """Entries of upper tables (n, 512), at pfns (n,), must lead to tables of the level below;
        levels are those of all pfns."""
        rows, slots, targets = referenced_pfns(tables)
        entries = tables[rows, slots]
        superpages = np.flatnonzero(entries & np.uint64(PTE_PSE))
        if superpages.size:
            row, slot = int(rows[superpages[0]]), int(slots[superpages[0]])
            expected = f"a pfn below {self._memory.p2m.size:#x}"
            found = f"{int(entries[superpages[0]]):#x}"
            self._refuse_entry(int(pfns[row]), slot, "a superpage", expected, found)
        below = levels[pfns[rows]] - 1
        wrong = np.flatnonzero(levels[targets] != below)
        if wrong.size:
            row, slot = int(rows[wrong[0]]), int(slots[wrong[0]])
            what = f"pfn {targets[wrong[0]]:#x}, which is no page table of level {below[wrong[0]]}"
            self._refuse_entry(int(pfns[row]), slot, what)

    def _refuse_entry(
        self,
        pfn: int,
        slot: int,
        what: str,
        expected: str | None = None,
        found: str | None = None,
    ) -> NoReturn:
        level = self._memory.types[pfn] & 7
        offset = self._memory.offset_of(pfn)
        raise ImageError(
            f"entry {slot} of the level-{level} page table at pfn {pfn:#x} names {what}",
            offset=None if offset is None else offset + 8 * slot,
            record=PageBatch.NAME,
            expected=expected,
            found=found,
        )


def _nothing() -> None:
    """There is nothing to wait for."""
