"""The page tables of the guest as the image leaves them, kept by their present entries only.

Tables are at most a few percent of a guest, and most of their entries are empty, so this is small
beside the image. A live migration sends a table many times: the last version counts, and older
ones are dropped as they pile up. An image that is all tables would be kept whole, so there is a
limit; the caller is told how many tables it cost.

The layout is that of a sparse matrix (CSR): the entries of table i are
`slots[starts[i]:starts[i + 1]]` and `ptes[...]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from xsave.frames import PTE_FRAME_MASK, PTE_PRESENT, table_level
from xsave.image.verify.frames import ABSENT, Frames

_PRESENT = np.uint64(PTE_PRESENT)
_FRAME = np.uint64(PTE_FRAME_MASK)
_SHIFT = np.uint64(12)
#: Page type -> level of the table, 0 for what is none.
LEVELS = np.array([table_level(page_type) for page_type in range(ABSENT + 1)], np.uint8)
#: Entries kept at most (10 bytes each): what a guest of 128 GiB needs for its direct map.
MAX_ENTRIES = 1 << 25
#: Entries that may be stale before they are dropped, and entries looked at in one go.
_SLACK = 1 << 20


def frames_of(ptes: np.ndarray) -> np.ndarray:
    """Return the pfns that entries name: u64, same shape."""
    pfns: np.ndarray = (ptes & _FRAME) >> _SHIFT
    return pfns


class Entries(NamedTuple):
    """Present entries of some tables: row of the table, slot in it, and the entry, each (k,)."""

    rows: np.ndarray
    slots: np.ndarray
    ptes: np.ndarray


@dataclass(frozen=True)
class Tables:
    """n tables, ascending by pfn: `pfns` u64, `levels` u8, `offsets` u64 of their first bytes in
    the image, all (n,); `starts` i64 (n + 1,); `slots` u16 and `ptes` u64 of all entries."""

    pfns: np.ndarray
    levels: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    slots: np.ndarray
    ptes: np.ndarray

    def select(self, rows: np.ndarray) -> Tables:
        """Return only these rows, in this order."""
        counts = np.diff(self.starts)[rows]
        starts = np.append(0, np.cumsum(counts))
        take = np.repeat(self.starts[rows] - starts[:-1], counts) + np.arange(starts[-1])
        return Tables(
            self.pfns[rows],
            self.levels[rows],
            self.offsets[rows],
            starts,
            self.slots[take],
            self.ptes[take],
        )

    def chunks(self) -> Iterator[Entries]:
        """Yield all entries, about a million at a time."""
        counts = np.diff(self.starts)
        first = 0
        while first < len(self.pfns):
            upto = int(np.searchsorted(self.starts, self.starts[first] + _SLACK, "right"))
            last = min(max(upto - 1, first + 1), len(self.pfns))
            piece = slice(int(self.starts[first]), int(self.starts[last]))
            rows = np.repeat(np.arange(first, last), counts[first:last])
            yield Entries(rows, self.slots[piece], self.ptes[piece])
            first = last

    def rows_of(self, pfns: np.ndarray) -> np.ndarray:
        """Return the rows of the tables at these pfns: i64, same shape; -1 where there is none."""
        if not len(self.pfns):
            return np.full(len(pfns), -1)
        at = np.minimum(np.searchsorted(self.pfns, pfns), len(self.pfns) - 1)
        return np.where(self.pfns[at] == pfns, at, -1)

    def entries_of(self, pfn: int) -> dict[int, int]:
        """Return slot -> entry of the table at one pfn; empty if there is none."""
        row = int(self.rows_of(np.array([pfn], np.uint64))[0])
        if row < 0:
            return {}
        piece = slice(int(self.starts[row]), int(self.starts[row + 1]))
        return dict(zip(self.slots[piece].tolist(), self.ptes[piece].tolist(), strict=True))

    def reached_from(self, roots: np.ndarray) -> np.ndarray:
        """Return which tables Xen validates when these pfns are pinned or loaded: bool (n,)."""
        reached = np.zeros(len(self.pfns), bool)
        rows = self.rows_of(roots)
        reached[rows[rows >= 0]] = True
        for level in (4, 3, 2):
            upper = self.select(np.flatnonzero(reached & (self.levels == level)))
            below = self.rows_of(np.unique(frames_of(upper.ptes)))
            below = below[below >= 0]
            reached[below[self.levels[below] == level - 1]] = True
        return reached

    def translate(self, root: int, address: int) -> int | None:
        """Return the pfn that a 64-bit guest's address leads to from its L4 table at `root`."""
        pfn = root
        for shift in (39, 30, 21, 12):
            entry = self.entries_of(pfn).get(address >> shift & 511)
            if entry is None:
                return None
            pfn = (entry & PTE_FRAME_MASK) >> 12
        return pfn


def _no_tables() -> Tables:
    u64, empty = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
    return Tables(u64, empty, u64, np.zeros(1, np.int64), np.zeros(0, np.uint16), u64)


@dataclass
class TableLog:
    """Takes tables as they come; the last version of a table wins."""

    nr_skipped: int = 0
    _kept: list[Tables] = field(default_factory=list)
    _nr_merged: int = 0
    _nr_waiting: int = 0

    def add(
        self, pfns: np.ndarray, levels: np.ndarray, offsets: np.ndarray, content: np.ndarray
    ) -> Entries:
        """Take tables with their content, u64 (k, 512); return their present entries."""
        rows, slots = np.nonzero(content & _PRESENT)
        ptes = content[rows, slots]
        counts = np.bincount(rows, minlength=len(pfns))
        starts = np.append(0, np.cumsum(counts))
        if self._has_room(len(ptes)):
            self._keep(Tables(pfns, levels, offsets, starts, slots.astype(np.uint16), ptes))
        else:
            self.nr_skipped += len(pfns)
        return Entries(rows, slots, ptes)

    def _has_room(self, nr_entries: int) -> bool:
        """Once there is no room there never is again: no merging over and over at the limit."""
        if not self.nr_skipped and self._nr_merged + self._nr_waiting + nr_entries > MAX_ENTRIES:
            self._merge()
        return (
            not self.nr_skipped and self._nr_merged + self._nr_waiting + nr_entries <= MAX_ENTRIES
        )

    def _keep(self, new: Tables) -> None:
        self._kept.append(new)
        self._nr_waiting += len(new.ptes) + len(new.pfns)
        if self._nr_waiting > self._nr_merged + _SLACK:
            self._merge()

    def _merge(self) -> None:
        if not self._kept:
            return
        fields = [[getattr(t, name) for t in self._kept] for name in Tables.__dataclass_fields__]
        pfns, levels, offsets, starts, slots, ptes = fields
        counts = np.concatenate([np.diff(s) for s in starts])
        whole = Tables(
            np.concatenate(pfns),
            np.concatenate(levels),
            np.concatenate(offsets),
            np.append(0, np.cumsum(counts)),
            np.concatenate(slots),
            np.concatenate(ptes),
        )
        order = np.argsort(whole.pfns, kind="stable")
        ordered = whole.pfns[order]
        merged = whole.select(order[np.append(ordered[1:] != ordered[:-1], True)])
        self._kept, self._nr_waiting = [merged], 0
        self._nr_merged = len(merged.ptes) + len(merged.pfns)

    def finish(self, frames: Frames) -> Tables:
        """Return the last version of every table whose pfn is a table in the end."""
        self._merge()
        tables = self._kept[0] if self._kept else _no_tables()
        return tables.select(np.flatnonzero(LEVELS[frames.types_of(tables.pfns)]))
