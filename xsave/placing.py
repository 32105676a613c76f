"""A domain's memory while its image is read: pfns get frames, pages get their bytes.

Whole batches only. Fresh frames hold zeros, so a page that is zero is not written at all and
stays untouched; it is written only over content that came earlier (a live migration's repeats:
the last occurrence of a pfn wins).
"""

from __future__ import annotations

import numpy as np

from xsave.errors import ImageError
from xsave.frames import INVALID_P2M_ENTRY, PAGE_SIZE, PageType
from xsave.guest.xen.domctl import Domctl
from xsave.image.pages import PageBatch, has_data, zero_pages

#: Frames asked for at once at least; what is left is given back at the end.
_POOL_FRAMES = 16384
_INVALID = np.uint64(INVALID_P2M_ENTRY)


class Memory:
    """p2m (size,) u64 and the last type of every pfn, types (size,) u8 (XTAB: never seen)."""

    def __init__(self, domctl: Domctl, p2m_size: int) -> None:
        self._domctl = domctl
        self._machine = domctl.machine
        self.p2m = np.full(p2m_size, _INVALID, np.uint64)
        self.types = np.full(p2m_size, PageType.XTAB, np.uint8)
        self._written = np.zeros(p2m_size, bool)
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
        self.types[batch.pfns] = batch.types
        with_frame = (batch.types != PageType.XTAB) & (batch.types != PageType.BROKEN)
        self.populate(batch.pfns[with_frame])
        with_data = batch.pfns[has_data(batch.types)]
        where = np.arange(with_data.size, dtype=np.uint64) * np.uint64(PAGE_SIZE)
        self._offsets[with_data] = where + np.uint64(batch.pages_offset)
        self._copy(with_data, batch.pages, zero)

    def offset_of(self, pfn: int) -> int | None:
        """Return where in the image the page's bytes were, None if it came with none."""
        return int(self._offsets[pfn]) or None

    def populate(self, pfns: np.ndarray) -> None:
        """Give frames to those of the pfns that have none yet (populate_pfns)."""
        missing = pfns[self.p2m[pfns] == _INVALID]
        if missing.size == 0:
            return
        missing = np.unique(missing)
        mfns = self._take(missing.size)
        self.p2m[missing] = mfns
        self._machine.m2p[mfns] = missing
        self.nr_populated += int(missing.size)

    def _take(self, nr: int) -> np.ndarray:
        if self._pool.size < nr:
            left = self.p2m.size - self.nr_populated - self._pool.size
            wanted = min(max(nr - self._pool.size, _POOL_FRAMES), left)
            self._pool = np.concatenate((self._pool, self._domctl.populate(wanted)))
        mfns, self._pool = self._pool[:nr], self._pool[nr:]
        return mfns

    def give_back_pool(self) -> None:
        """Free the frames that were not needed."""
        self._machine.free(self._pool)
        self._pool = self._pool[:0]

    def _copy(self, pfns: np.ndarray, pages: np.ndarray, zero: np.ndarray | None) -> None:
        if pfns.size == 0:
            return
        if zero is None:
            full = ~zero_pages(pages)
        else:
            full = ~zero
            rows = np.flatnonzero(full)
            if rows.size:
                full[rows] = ~zero_pages(pages if rows.size == len(pages) else pages[rows])
        full |= self._written[pfns]
        mfns = self.p2m[pfns]
        if full.all():
            self._machine.pages[mfns] = pages
        elif full.any():
            self._machine.pages[mfns[full]] = pages[full]
        self._written[pfns[full]] = True
