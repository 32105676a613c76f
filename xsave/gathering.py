"""From frames to PAGE_DATA: the pages of a suspended domain, a batch of pfns at a time.

Frames that nobody touched are known without reading them, the others are gathered into a room
(they are shuffled in machine memory) and looked at for zeros; what is zero leaves as `Zeros`.
A few pages are not written as their frames hold them: page tables, the p2m, start_info. They
come as Patches. Whole batches only, nothing is done page by page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xsave.frames import INVALID_P2M_ENTRY, PAGE_SIZE
from xsave.guest.xen.domctl import Domctl
from xsave.image.buffers import Buffer, Zeros
from xsave.image.pages import MAX_BATCH
from xsave.image.stream import StreamEncoder

_INVALID = np.uint64(INVALID_P2M_ENTRY)


@dataclass(frozen=True)
class Patches:
    """Pages whose content is not their frame's: pfns (k,) intp, ascending; pages (k, 512) u64."""

    pfns: np.ndarray
    pages: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Patches:
        """Join (pfns, pages) pairs; where a pfn comes again the last one counts."""
        pfns = np.concatenate([part[0] for part in parts]).astype(np.intp)
        pages = np.concatenate([part[1] for part in parts])
        order = np.argsort(pfns, kind="stable")
        last = np.ones(pfns.size, bool)
        last[:-1] = np.diff(pfns[order]) != 0
        return cls(pfns[order][last], pages[order[last]])


@dataclass(frozen=True)
class Batch:
    """One PAGE_DATA record as buffers; valid until its room is filled again."""

    end_pfn: int
    buffers: list[Buffer]
    nr_pages: int
    zero_pages: int


class Gatherer:
    """The PAGE_DATA records of one domain, in pfn order.

    p2m (n,) u64, types (n,) u8 (XTAB where p2m has no frame). Every record uses the next of
    `nr_rooms` rooms.
    """

    def __init__(
        self, domctl: Domctl, p2m: np.ndarray, types: np.ndarray, patches: Patches, nr_rooms: int
    ) -> None:
        self._mem = domctl.machine.mem
        self._p2m = p2m
        self._types = types
        self._patches = patches
        self._backed = p2m != _INVALID
        #: Pages that must be looked at: touched frames, and patches.
        self._wanted = np.zeros(p2m.size, bool)
        self._wanted[self._backed] = domctl.machine.resident(p2m[self._backed])
        self._wanted[patches.pfns] = self._backed[patches.pfns]
        self._rooms = [np.empty((MAX_BATCH, PAGE_SIZE // 8), np.uint64) for _ in range(nr_rooms)]

    def __iter__(self) -> Iterator[Batch]:
        for number, first in enumerate(range(0, self._p2m.size, MAX_BATCH)):
            yield self._batch(first, self._rooms[number % len(self._rooms)])

    def _batch(self, first: int, room: np.ndarray) -> Batch:
        end = min(first + MAX_BATCH, self._p2m.size)
        here = slice(first, end)
        pfns = np.arange(first, end, dtype=np.uint64)
        header = StreamEncoder.page_data_header(pfns, self._types[here])
        backed = self._backed[here]
        nr_pages = int(np.count_nonzero(backed))
        taken = np.flatnonzero(self._wanted[here])
        content = room[: taken.size]
        self._gather(first, taken, content)
        full = np.flatnonzero(np.bitwise_or.reduce(content, axis=1))
        places = (np.cumsum(backed) - 1)[taken[full]]
        buffers = [header, *_runs(content, full, places, nr_pages)]
        return Batch(end, buffers, nr_pages, nr_pages - int(full.size))

    def _gather(self, first: int, taken: np.ndarray, content: np.ndarray) -> None:
        """Fill content (k, 512) with the pages of pfns first + taken (k,)."""
        if not taken.size:
            return
        mfns = self._p2m[first + taken].astype(np.intp)
        # "clip" lets numpy write to `out` directly; all these mfns are the domain's own.
        np.take(self._mem, mfns, axis=0, out=content, mode="clip")
        pfns = self._patches.pfns
        low, high = np.searchsorted(pfns, (first, first + MAX_BATCH))
        rows = np.searchsorted(taken, pfns[low:high] - first)
        if rows.size:
            content[rows] = self._patches.pages[low:high]


def _runs(content: np.ndarray, full: np.ndarray, places: np.ndarray, nr: int) -> list[Buffer]:
    """Return the data of nr pages: rows `full` of content at these places, zeros between them."""
    buffers: list[Buffer] = []
    if full.size:
        breaks = np.flatnonzero(np.diff(places) != 1) + 1
        starts = np.concatenate(([0], breaks))
        ends = np.concatenate((breaks, [full.size]))
        done = 0
        for place, row, nr_rows in zip(
            places[starts].tolist(), full[starts].tolist(), (ends - starts).tolist(), strict=True
        ):
            buffers += [Zeros((place - done) * PAGE_SIZE), content[row : row + nr_rows]]
            done = place + nr_rows
        nr -= done
    return [buffer for buffer in (*buffers, Zeros(nr * PAGE_SIZE)) if buffer.nbytes]
