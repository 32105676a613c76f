"""A domain's memory while its image is read: pfns get frames, pages get their bytes.

Whole batches only. Fresh frames hold zeros, so a page that is zero is not written at all and
stays untouched; it is written only over content that came earlier (a live migration's repeats:
the last occurrence of a pfn wins).

What a restore waits for is the first touch of its frames. So batches are copied by a few threads
(numpy copies without the GIL) while the next one is read and the domain's process still starts;
but a pfn that comes again waits for all that came before it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from xsave.errors import ImageError, OutOfFrames
from xsave.frames import INVALID_P2M_ENTRY, PAGE_SIZE, PageType
from xsave.guest.xen.domctl import Domctl
from xsave.image.pages import PageBatch, has_data, zero_pages

#: Frames asked for at once, at least; what is left is given back at the end.
_POOL_FRAMES = 16384
_MAX_THREADS = 4
#: Image data that may wait to be copied, unless one record alone is more.
_MAX_WAITING_BYTES = 32 << 20
_INVALID = np.uint64(INVALID_P2M_ENTRY)


class Copies:
    """Calls under way on a few threads; what one raises is raised by a later method."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), "place")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._nbytes = 0

    def start(self, nbytes: int, call: Callable[..., None], *arguments: Any) -> None:
        """Call soon; wait first until there is room for the data that the call holds."""
        while self._waiting and self._nbytes + nbytes > _MAX_WAITING_BYTES:
            self._finish_oldest()
        self._waiting.append((self._pool.submit(call, *arguments), nbytes))
        self._nbytes += nbytes

    def _finish_oldest(self) -> None:
        future, nbytes = self._waiting.popleft()
        self._nbytes -= nbytes
        future.result()

    def finish(self) -> None:
        """Wait for all."""
        while self._waiting:
            self._finish_oldest()

    def stop(self) -> None:
        """End the threads; what has not begun is dropped, and nothing runs when this returns."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Memory:
    """p2m (size,) u64 and the last type of every pfn, types (size,) u8 (XTAB: never seen)."""

    def __init__(self, domctl: Domctl, p2m_size: int) -> None:
        self._domctl = domctl
        self._machine = domctl.machine
        self.p2m = np.full(p2m_size, _INVALID, np.uint64)
        self.types = np.full(p2m_size, PageType.XTAB, np.uint8)
        self._copies = Copies()
        self._came = np.zeros(p2m_size, bool)  # with data, written or not
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
        if not _ascending(missing):
            missing = np.unique(missing)
        mfns = self._take(missing.size)
        self.p2m[missing] = mfns
        self._machine.m2p[mfns] = missing
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
        try:
            return self._domctl.populate(wanted)
        except OutOfFrames:
            if wanted == needed:
                raise
            return self._domctl.populate(needed)

    def complete(self) -> None:
        """All pages came: have them in their frames when this returns."""
        self._copies.finish()
        self._copies.stop()

    def stop(self) -> None:
        """Have nothing write to the frames any more; they may go to another domain."""
        self._copies.stop()

    def give_back_pool(self) -> None:
        """Free the frames that were not needed."""
        self._machine.free(self._pool)
        self._pool = self._pool[:0]

    def _copy(self, pfns: np.ndarray, pages: np.ndarray, zero: np.ndarray | None) -> None:
        if not _ascending(pfns):
            last = _last_of_each(pfns)
            pfns, pages, zero = pfns[last], pages[last], None if zero is None else zero[last]
        again = bool(self._came[pfns].any())
        if again:
            self._copies.finish()
        elif zero is not None and zero.all():
            return
        self._came[pfns] = True
        self._copies.start(pages.nbytes, self._copy_now, pfns, pages, zero)

    def _copy_now(self, pfns: np.ndarray, pages: np.ndarray, zero: np.ndarray | None) -> None:
        full = _not_zero(pages, zero)
        full |= self._written[pfns]
        mfns = self.p2m[pfns]
        if full.all():
            self._machine.pages[mfns] = pages
        elif full.any():
            self._machine.pages[mfns[full]] = pages[full]
        self._written[pfns[full]] = True


def _ascending(pfns: np.ndarray) -> bool:
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
