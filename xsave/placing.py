"""A domain's memory while its image is read: pfns get frames, pages get their bytes.

Whole batches only. Fresh frames hold zeros, so a page that is zero is not written at all and
stays untouched; it is written only over content that came earlier (a live migration's repeats:
the last occurrence of a pfn wins).

What a restore waits for is the first touch of its frames. So a thread puts pages into them, in
the order in which they came, while the next ones are read and the domain's process still starts.
Page tables do not wait for the thread: they are in place as soon as they are read, so that they
can be localised and pinned while it works off the rest.

What came, and which frames changed, is noted as it happens: at the end of a live migration nobody
has to go through all pfns for that, while the guest stands still.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xsave.behind import Behind
from xsave.distinct import distinct
from xsave.errors import ImageError, OutOfFrames
from xsave.frames import INVALID_P2M_ENTRY, PAGE_SIZE, PageType
from xsave.guest.xen.domctl import Domctl
from xsave.image.pages import PageBatch, has_data, zero_pages

#: Frames asked for at once, at least; what is left is given back at the end.
_POOL_FRAMES = 65536
#: Pages that may wait to be put into frames, unless one record alone is more.
_MAX_WAITING_BYTES = 96 << 20
#: Of a live migration hardly any: what waits here at the guest's suspend, the guest waits for.
_MAX_WAITING_LIVE_BYTES = 4 << 20
_FEW_PAGES = 512
_INVALID = np.uint64(INVALID_P2M_ENTRY)
NO_PFNS = np.empty(0, np.uint64)
_XALLOC, _NOTAB = np.uint8(PageType.XALLOC), np.uint8(PageType.NOTAB)
PFNS_PER_P2M_PAGE = 512
#: What one touch brings into a process (fault_around_bytes).
FRAMES_PER_WINDOW = 16


class Memory:
    """p2m (size,) u64 and the last type of every pfn, types (size,) u8 (XTAB: never seen)."""

    def __init__(self, domctl: Domctl, p2m_size: int, *, live: bool = False) -> None:
        """live: the guest may still run where the pages come from."""
        self._domctl = domctl
        self._machine = domctl.machine
        self.p2m = np.full(p2m_size, _INVALID, np.uint64)
        self.types = np.full(p2m_size, PageType.XTAB, np.uint8)
        self._written = np.zeros(p2m_size, bool)
        self._queued = np.zeros(p2m_size, bool)  # ever left to the thread
        #: Hears which pfns (n,) come, before anything of them changes.
        self.before_renewal: Callable[[np.ndarray], None] = lambda pfns: None
        #: Is called before the bytes of any of them change.
        self.before_writing: Callable[[], None] = lambda: None
        #: Hears of the same pfns when their types are known.
        self.after_renewal: Callable[[np.ndarray], None] = lambda pfns: None
        #: For who keeps the p2m's pages: of which of these some pfns have another frame than when
        #: that was last taken back, and which pfns came.
        self.moved = np.ones(-(-p2m_size // PFNS_PER_P2M_PAGE), bool)
        self.came = np.zeros(p2m_size, bool)
        #: One of the frames that pages were put into, of each window of frames; 0: there is none.
        self.filled = np.zeros(-(-self._machine.nr_frames // FRAMES_PER_WINDOW), np.int64)
        self._given_up: list[np.ndarray] = []  # came as holes, and have a frame
        self._live = live
        most = _MAX_WAITING_LIVE_BYTES if live else _MAX_WAITING_BYTES
        self._write_behind = Behind(self._machine.write_frames, most)
        self._offsets = np.zeros(p2m_size, np.uint64)
        self._pool = np.empty(0, np.uint64)
        self.nr_populated = 0

    def place(self, batch: PageBatch, zero: np.ndarray | None, offset: int) -> None:
        """Take one PAGE_DATA record; zero: (m,) bool, data pages known to be zero, or None."""
        if (batch.pfns >= np.uint64(self.p2m.size)).any():
            worst = int(batch.pfns[batch.pfns >= np.uint64(self.p2m.size)][0])
            raise ImageError(
                "a pfn lies outside the p2m",
                offset=offset,
                record="PAGE_DATA",
                expected=f"below {self.p2m.size:#x}",
                found=f"{worst:#x}",
            )
        self.place_types(batch.pfns, batch.types)
        with_data = batch.pfns[has_data(batch.types)]
        where = np.arange(with_data.size, dtype=np.uint64) * np.uint64(PAGE_SIZE)
        self._offsets[with_data] = where + np.uint64(batch.pages_offset)
        if with_data.size:
            rows = self._rows_to_write(with_data, batch.pages, zero)
            self.before_writing()
            self._write(with_data[rows], batch.pages, rows)

    def place_types(self, pfns: np.ndarray, types: np.ndarray) -> None:
        """Take the entries (n,) of records: whatever can be there gets a frame."""
        self.before_renewal(pfns)
        # A page that came without bytes is an ordinary one; only where it is there counts.
        self.types[pfns] = np.where(types == _XALLOC, _NOTAB, types)
        self.came[pfns] = True
        self.after_renewal(pfns)
        holes = types == PageType.XTAB
        self.populate(pfns[~holes & (types != PageType.BROKEN)])
        if holes.any() and (given_up := pfns[holes & (self.p2m[pfns] != _INVALID)]).size:
            self._given_up.append(given_up)

    def offset_of(self, pfn: int) -> int | None:
        """Return where in the image the page's bytes were, None if it came with none."""
        return int(self._offsets[pfn]) or None

    def populate(self, pfns: np.ndarray) -> None:
        """Give frames to those of the pfns that have none yet (populate_pfns)."""
        missing = pfns[self.p2m[pfns] == _INVALID]
        if missing.size == 0:
            return
        if not is_ascending(missing):
            missing = np.unique(missing)
        mfns = self._take(missing.size)
        self.p2m[missing] = mfns
        self.moved[missing // PFNS_PER_P2M_PAGE] = True
        self._machine.m2p[mfns.view(np.int64)] = missing
        self.nr_populated += int(missing.size)

    def _take(self, nr: int) -> np.ndarray:
        if self._pool.size < nr:
            self._pool = np.concatenate((self._pool, self._more(nr - self._pool.size)))
        mfns, self._pool = self._pool[:nr], self._pool[nr:]
        return mfns

    def _more(self, needed: int) -> np.ndarray:
        """Take at least `needed` frames; more if there are more, so that this happens rarely."""
        left = self.p2m.size - self.nr_populated - self._pool.size
        wanted = min(max(needed, _POOL_FRAMES, self.nr_populated), left)
        if left - wanted < _POOL_FRAMES:  # what comes last is not to wait for a few more
            wanted = left
        try:
            return self._domctl.populate(wanted)
        except OutOfFrames:
            if wanted == needed:
                raise
            return self._domctl.populate(needed)

    def grow(self, p2m_size: int) -> None:
        """Make room for more pfns: new ones have no frame and were never seen."""
        more = p2m_size - self.p2m.size
        if more <= 0:
            return
        self.p2m = np.append(self.p2m, np.full(more, _INVALID))
        self.types = np.append(self.types, np.full(more, PageType.XTAB, np.uint8))
        self._written = np.append(self._written, np.zeros(more, bool))
        self._queued = np.append(self._queued, np.zeros(more, bool))
        self.came = np.append(self.came, np.zeros(more, bool))
        # The page that was the last one says of more pfns now that they are holes.
        self.moved = np.ones(-(-p2m_size // PFNS_PER_P2M_PAGE), bool)
        self._offsets = np.append(self._offsets, np.zeros(more, np.uint64))

    def read_tables(self, pfns: np.ndarray) -> np.ndarray:
        """All records came: return the page tables at these pfns, ascending, as the
        image has them, (n, 512) u64."""
        if self._queued[pfns].any():
            self._write_behind.finish()
        tables: np.ndarray = self._machine.mem[self.p2m[pfns]]
        return tables

    def write_tables(self, pfns: np.ndarray, tables: np.ndarray) -> None:
        """Put page tables (n, 512) into their frames."""
        self._machine.mem[self.p2m[pfns]] = tables

    def in_place(self, pfns: np.ndarray) -> np.ndarray:
        """Return (n,) bool: the pages whose bytes are in their frames as soon as they are read."""
        return ~self._queued[pfns]

    def write_early(self, pfns: np.ndarray, pages: np.ndarray) -> None:
        """Put pages (n, 512) u64 into the frames of these pfns (n,), behind what came for them so
        far; more may come."""
        self._written[pfns] = self._queued[pfns] = True
        rows = np.arange(pfns.size)
        self._write_behind(pages.nbytes, self.p2m[pfns], pages.view(np.uint8), rows)

    def holes(self) -> np.ndarray:
        """All records came: return the pfns that had a frame and ended as holes (the guest gave
        the page up while it was migrated)."""
        pfns = distinct(pfns.view(np.int64) for pfns in self._given_up)
        return pfns[(self.p2m[pfns] != _INVALID) & (self.types[pfns] == PageType.XTAB)]

    def drop(self, holes: np.ndarray) -> None:
        """Free the frames of holes()."""
        if not holes.size:
            return
        if self._queued[holes].any():
            self._write_behind.finish()
        self._machine.free(self.p2m[holes])
        self.p2m[holes] = _INVALID
        self.moved[holes // PFNS_PER_P2M_PAGE] = True
        self._written[holes] = False
        self.nr_populated -= int(holes.size)

    def have(self, pfns: np.ndarray) -> None:
        """All records came: have these pages in their frames, to be looked at and changed."""

    def complete(self, but: np.ndarray = NO_PFNS) -> None:
        """All records came: have the pages in their frames when this returns. Those of these pfns
        the caller writes anew."""
        self._write_behind.finish()

    def serve(self) -> None:
        """From here on the domain's process may look at any page."""

    def stop(self) -> None:
        """Have nothing write to the frames any more; they may go to another domain."""
        self._write_behind.abandon()

    def give_back_pool(self) -> None:
        """Free the frames that were not needed."""
        self._machine.free(self._pool)
        self._pool = self._pool[:0]

    def _rows_to_write(
        self, pfns: np.ndarray, pages: np.ndarray, zero: np.ndarray | None
    ) -> np.ndarray:
        """Return which rows of pages are not what the frames of their pfns hold already."""
        rows = np.arange(pfns.size)
        if not is_ascending(pfns):
            rows = _last_of_each(pfns)
        rows = rows[_not_zero(pages, zero)[rows] | self._written[pfns[rows]]]
        self._written[pfns[rows]] = True
        return rows

    def _write(self, pfns: np.ndarray, pages: np.ndarray, rows: np.ndarray) -> None:
        """Put rows (k,) of pages into the frames of pfns (k,): tables now, the rest behind."""
        mfns = self.p2m[pfns]
        if self._live:
            self.filled[mfns // FRAMES_PER_WINDOW] = mfns
        now = (table_levels(self.types[pfns]) != 0) & ~self._queued[pfns]
        if now.any():
            self._machine.write_frames(mfns[now], pages, rows[now])
            pfns, mfns, rows = pfns[~now], mfns[~now], rows[~now]
        if self._live and rows.size <= _FEW_PAGES and self._write_behind.idle:
            # Two threads would wait for each other's turn longer than this takes.
            self._machine.write_frames(mfns, pages, rows)
            return
        self._queued[pfns] = True
        self._write_behind(rows.size * PAGE_SIZE, mfns, pages, rows)


def table_levels(types: np.ndarray) -> np.ndarray:
    """Return (n,) u8: 1 to 4 for page tables, pinned or not, 0 for all else."""
    return np.where(types < PageType.BROKEN, types & 7, 0)


def is_ascending(pfns: np.ndarray) -> bool:
    """True for what nearly every record has: no pfn twice, and no need to sort."""
    return bool((pfns[1:] > pfns[:-1]).all())


def _last_of_each(pfns: np.ndarray) -> np.ndarray:
    """Return where each pfn stands for the last time, ascending."""
    _, from_behind = np.unique(pfns[::-1], return_index=True)
    return np.sort(pfns.size - 1 - from_behind)


def _not_zero(pages: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    """Return (m,) bool, which pages hold anything; those known to be zero are not looked at.

    The first word of a page nearly always tells; a page is only read whole if that is zero.
    """
    full = np.ones(len(pages), bool) if zero is None else ~zero
    rows = np.flatnonzero(full)
    doubtful = rows[~pages[rows, :8].any(axis=1)]
    full[doubtful] = ~zero_pages(pages[doubtful])
    return full
