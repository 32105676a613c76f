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
from xsave.frames import INVALID_P2M_ENTRY, PTE_PSE, TYPE_PIN
from xsave.guest.xen.domctl import Domctl
from xsave.image.pages import PageBatch
from xsave.placing import Memory, table_levels

_INVALID = np.uint64(INVALID_P2M_ENTRY)
#: Tables that are pinned ahead at once: a millisecond's work or two.
_PIN_BATCH = 64
_LOCALISE_BATCH = 256
_BY_PFN = ("_tables", "_waiting", "_l1", "_ahead", "_untried", "_pinned", "_own_pins", "_seen")


class Localiser:
    """Works on the tables in one Memory of a domain."""

    def __init__(self, domctl: Domctl, memory: Memory) -> None:
        self._domctl = domctl
        self._machine = domctl.machine
        self._memory = memory
        memory.before_renewal, memory.after_renewal = self._forget, self._sort
        memory.before_writing = self._wait_for_unpins
        nr_pfns = memory.p2m.size
        # By pfn. Tables; not localised yet; of level 1; localised; to be pinned ahead; pinned so;
        # to be pinned in the end.
        self._tables, self._waiting = np.zeros(nr_pfns, bool), np.zeros(nr_pfns, bool)
        self._l1 = np.zeros(nr_pfns, bool)
        self._ahead = np.zeros(nr_pfns, bool)
        self._untried, self._pinned = np.zeros(nr_pfns, bool), np.zeros(nr_pfns, bool)
        self._own_pins = np.zeros(nr_pfns, bool)
        self._seen = np.zeros(nr_pfns, bool)  # upper tables that this process has touched
        self._unpins: list[Callable[[], object]] = []  # asked for: what waits for them
        self._ahead_of_all = False  # nothing can be done before more comes

    def _grow(self) -> None:
        more = np.zeros(self._memory.p2m.size - self._ahead.size, bool)
        for name in _BY_PFN:
            setattr(self, name, np.append(getattr(self, name), more))

    def _forget(self, pfns: np.ndarray) -> None:
        """These come anew: no table may be in use while it changes."""
        if self._memory.p2m.size > self._ahead.size:
            self._grow()
        if self._pinned[pfns].any():
            coming = np.zeros(self._pinned.size, bool)
            coming[pfns] = True
            self._ask_unpin(np.flatnonzero(self._pinned & coming))
        self._ahead[pfns] = self._untried[pfns] = False

    def _sort(self, pfns: np.ndarray) -> None:
        """These have come: which of them are tables?"""
        self._ahead_of_all = False
        types = self._memory.types[pfns]
        levels = table_levels(types)
        self._tables[pfns] = self._waiting[pfns] = levels != 0
        self._l1[pfns] = levels == 1
        self._own_pins[pfns] = (levels != 0) & (types & TYPE_PIN != 0)

    def _ask_unpin(self, pfns: np.ndarray) -> None:
        """Neither the bytes nor the frames of these may change before _wait_for_unpins()."""
        if pfns.size:
            self._unpins.append(self._domctl.ask_unpin(self._memory.p2m[pfns]))
            self._pinned[pfns] = False

    def _wait_for_unpins(self) -> None:
        while self._unpins:
            self._unpins.pop(0)()

    def ask_pin(self) -> Callable[[], object]:
        """All is localised: have the tables that the guest has pinned pinned, and the pins ahead
        that are not its own undone; return what waits until that is done."""
        memory = self._memory
        pfns = np.flatnonzero(self._tables & ~self._pinned)
        ahead = np.flatnonzero(self._pinned & ~self._own_pins)
        return self._domctl.ask_pin(
            memory.p2m[pfns], memory.types[pfns] & 7, self._own_pins[pfns], memory.p2m[ahead]
        )

    def work_ahead(self) -> bool:
        """Records are still to come: do a part of what can be done. False if nothing can."""
        self._ahead_of_all = self._ahead_of_all or not self._work_ahead()
        return not self._ahead_of_all

    def _work_ahead(self) -> bool:
        if self._localise_ahead():
            return True
        pfns = np.flatnonzero(self._untried)[:_PIN_BATCH]
        if pfns.size:
            self._untried[pfns] = False
            self._pinned[pfns] = self._domctl.pin_l1s(self._memory.p2m[pfns])
            return True
        return self._touch_ahead()

    def _touch_ahead(self) -> bool:
        """The upper tables are read at the end: the first touch takes the longest of that."""
        pfns = np.flatnonzero(self._waiting & ~self._l1 & ~self._seen)[:_LOCALISE_BATCH]
        self._seen[pfns] = True
        self._machine.mem[self._memory.p2m[pfns], 0].any()
        return pfns.size > 0

    def _localise_ahead(self) -> bool:
        pfns = np.flatnonzero(self._waiting & self._l1)
        pfns = pfns[self._memory.in_place(pfns)]
        batches = range(0, pfns.size, _LOCALISE_BATCH)
        return any(self._localise_ready(pfns[first : first + _LOCALISE_BATCH]) for first in batches)

    def _localise_ready(self, pfns: np.ndarray) -> bool:
        """Localise those of these tables whose pages all have frames; False if none is so."""
        memory = self._memory
        tables = memory.read_tables(pfns)
        at, targets = present_entries(tables)
        known = np.zeros(targets.size, bool)
        inside = targets < np.uint64(memory.p2m.size)
        known[inside] = memory.p2m[targets[inside]] != _INVALID
        ready = np.ones(pfns.size, bool)
        ready[at[~known] >> 9] = False
        pfns = pfns[ready]
        memory.write_tables(pfns, localise(tables[ready], memory.p2m))
        self._ahead[pfns] = self._untried[pfns] = True
        self._waiting[pfns] = False
        return pfns.size > 0

    def run(self) -> None:
        """All records came: drop the holes, have all tables localised. Raises ImageError."""
        memory = self._memory
        self._wait_for_unpins()  # from here on the caller may change or drop any other page
        if (holes := memory.holes()).size:
            self._go_back()
            memory.drop(holes)
        if memory.p2m.size > self._ahead.size:
            self._grow()
        pfns = np.flatnonzero(self._waiting)
        tables = memory.read_tables(pfns)
        at, targets = present_entries(tables)
        if (targets >= np.uint64(memory.p2m.size)).any():
            self._refuse_outside(tables, pfns)
        self._check_upper(tables, at, targets, pfns)
        named = np.zeros(memory.p2m.size, bool)
        named[targets] = True
        memory.populate(np.flatnonzero(named))
        localise_entries(tables, at, targets, memory.p2m)
        memory.write_tables(pfns, tables)
        self._waiting[pfns] = False

    def _go_back(self) -> None:
        """Some frames are to be dropped: tables may name them."""
        self._ask_unpin(np.flatnonzero(self._pinned))
        self._wait_for_unpins()
        pfns = np.flatnonzero(self._ahead)
        tables = self._memory.read_tables(pfns)
        levels = np.ones(pfns.size, np.uint8)
        back = canonicalise(tables, levels, self._domctl.machine.m2p, self._memory.p2m)
        self._memory.write_tables(pfns, back.tables)
        self._ahead[:] = self._untried[:] = False
        self._waiting[pfns] = True

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
        pfns: np.ndarray,
    ) -> None:
        """Entries of the upper ones of these tables (n, 512), at pfns (n,), must lead to tables of
        the level below; at, targets: of all present entries."""
        types = self._memory.types
        levels = table_levels(types[pfns])
        of_upper = levels[at >> 9] > 1
        at, targets = at[of_upper], targets[of_upper]
        entries = tables.reshape(-1)[at]
        superpages = np.flatnonzero(entries & np.uint64(PTE_PSE))
        if superpages.size:
            first = superpages[0]
            expected = f"a pfn below {self._memory.p2m.size:#x}"
            pfn, slot = int(pfns[at[first] >> 9]), int(at[first] & 511)
            self._refuse_entry(pfn, slot, "a superpage", expected, f"{int(entries[first]):#x}")
        below = levels[at >> 9] - 1
        wrong = np.flatnonzero(table_levels(types[targets]) != below)
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
