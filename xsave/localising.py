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

from xsave.canonical import canonicalise, localise, localise_entries, present_entries
from xsave.errors import ImageError
from xsave.frames import INVALID_P2M_ENTRY, PTE_PSE, TYPE_PIN, PageType
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

    def still_to_pin(self) -> np.ndarray:
        """Return the pfns of the tables that the guest has pinned and that are not pinned yet."""
        own = self._own_pins()
        own[: self._pinned.size] &= ~self._pinned
        return np.flatnonzero(own)

    def _own_pins(self) -> np.ndarray:
        types = self._memory.types
        own: np.ndarray = (types & TYPE_PIN != 0) & (types < PageType.BROKEN)
        return own

    def ask_unpin(self) -> Callable[[], object]:
        """Undo those pins of what was pinned ahead that are not the guest's own; return what waits
        until that is done."""
        pfns = np.flatnonzero(self._pinned & ~self._own_pins()[: self._pinned.size])
        return self._domctl.ask_unpin(self._memory.p2m[pfns]) if pfns.size else _nothing

    def work_ahead(self) -> bool:
        """Records are still to come: do a part of what can be done. False if nothing can."""
        if self._localise_ahead():
            return True
        pfns = np.flatnonzero(self._ahead & ~self._tried)[:_PIN_BATCH]
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
        at, targets = present_entries(tables)
        known = np.zeros(targets.size, bool)
        inside = targets < np.uint64(memory.p2m.size)
        known[inside] = memory.p2m[targets[inside]] != _INVALID
        ready = np.ones(pfns.size, bool)
        ready[at[~known] >> 9] = False
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
        at, targets = present_entries(tables)
        if (targets >= np.uint64(memory.p2m.size)).any():
            self._refuse_outside(tables, pfns)
        self._check_upper(tables, at, targets, levels, pfns)
        named = np.zeros(memory.p2m.size, bool)
        named[targets] = True
        memory.populate(np.flatnonzero(named))
        localise_entries(tables, at, targets, memory.p2m)
        memory.write_tables(pfns, tables)

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
        at, targets = present_entries(tables)
        row, slot = divmod(int(at[targets >= np.uint64(size)][0]), 512)
        found = f"{int(tables[row, slot]):#x}"
        what, expected = "a pfn outside the p2m", f"a pfn below {size:#x}"
        self._refuse_entry(int(pfns[row]), slot, what, expected, found)

    def _check_upper(
        self,
        tables: np.ndarray,
        at: np.ndarray,
        targets: np.ndarray,
        levels: np.ndarray,
        pfns: np.ndarray,
    ) -> None:
        """Entries of the upper ones of these tables (n, 512), at pfns (n,), must lead to tables of
        the level below; at, targets: of all present entries; levels are those of all pfns."""
        of_upper = levels[pfns[at >> 9]] > 1
        at, targets = at[of_upper], targets[of_upper]
        entries = tables.reshape(-1)[at]
        superpages = np.flatnonzero(entries & np.uint64(PTE_PSE))
        if superpages.size:
            first = superpages[0]
            expected = f"a pfn below {self._memory.p2m.size:#x}"
            pfn, slot = int(pfns[at[first] >> 9]), int(at[first] & 511)
            self._refuse_entry(pfn, slot, "a superpage", expected, f"{int(entries[first]):#x}")
        below = levels[pfns[at >> 9]] - 1
        wrong = np.flatnonzero(levels[targets] != below)
        if wrong.size:
            first = wrong[0]
            what = f"pfn {targets[first]:#x}, which is no page table of level {below[first]}"
            self._refuse_entry(int(pfns[at[first] >> 9]), int(at[first] & 511), what)

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
