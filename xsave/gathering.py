"""From frames to PAGE_DATA: the pages of a suspended domain, a batch of pfns at a time.

Nothing is copied here. A record's buffers name the frames (`Rows`), which lie shuffled in machine
memory, and the kernel or a compressor fetches them. Frames that nobody touched are known without
reading them, of the others the first word nearly always says that they are not zero; what is
zero leaves as `Zeros`. A few pages are not written as their frames hold them: page tables, the
p2m, start_info. They come as Patches. Whole batches only, nothing is done page by page; what is
looked up for many batches together is looked up when they are due, so that the first ones are on
their way at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from xsave.frames import INVALID_P2M_ENTRY, PAGE_SIZE
from xsave.guest.xen.domctl import Domctl
from xsave.image.buffers import Buffer, Rows, Zeros
from xsave.image.pages import MAX_BATCH
from xsave.image.stream import StreamEncoder

_INVALID = np.uint64(INVALID_P2M_ENTRY)
#: Pfns looked at together, a multiple of MAX_BATCH.
_WINDOW = 16 * MAX_BATCH
#: Where a page's bytes come from.
_ZERO, _FRAME, _PATCH = 0, 1, 2


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

    def within(self, first: int, end: int) -> Patches:
        """Return those of the pfns from first to end."""
        start, stop = np.searchsorted(self.pfns, (first, end))
        return Patches(self.pfns[start:stop], self.pages[start:stop])


@dataclass(frozen=True)
class Batch:
    """One PAGE_DATA record as buffers, valid as long as the guest stands still."""

    end_pfn: int
    buffers: list[Buffer]
    nr_pages: int
    zero_pages: int


class Gatherer:
    """The PAGE_DATA records of one domain, in pfn order.

    p2m (n,) u64, types (n,) u8 (XTAB where p2m has no frame); patches(first, end): those of the
    pfns from first to end.
    """

    def __init__(
        self,
        domctl: Domctl,
        p2m: np.ndarray,
        types: np.ndarray,
        patches: Callable[[int, int], Patches],
    ) -> None:
        self._machine = domctl.machine
        self._mem = domctl.machine.mem
        self._p2m = p2m
        self._types = types
        self._patches_of = patches
        self._backed = p2m != _INVALID

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self._p2m.size, _WINDOW):
            stop = min(start + _WINDOW, self._p2m.size)
            patches = self._patches_of(start, stop)
            sources = self._sources(start, stop, patches)
            for first in range(start, stop, MAX_BATCH):
                end = min(first + MAX_BATCH, stop)
                yield self._batch(first, end, sources[first - start : end - start], patches)

    def _sources(self, first: int, end: int, patches: Patches) -> np.ndarray:
        """Return where the pages of these pfns come from, (end - first,) u8."""
        sources = np.full(end - first, _ZERO, np.uint8)
        backed = self._backed[first:end]
        touched = self._machine.resident(self._p2m[first:end][backed])
        sources[backed] = np.where(touched, _FRAME, _ZERO)
        is_zero = ~patches.pages.any(axis=1)
        sources[patches.pfns - first] = np.where(is_zero, _ZERO, _PATCH)
        return sources

    def _batch(self, first: int, end: int, sources: np.ndarray, patches: Patches) -> Batch:
        header = StreamEncoder.page_data_header(
            np.arange(first, end, dtype=np.uint64), self._types[first:end]
        )
        backed = np.flatnonzero(self._backed[first:end])
        pfns, sources = first + backed, sources[backed]
        self._find_zero(pfns, sources)
        buffers = [header, *self._runs(pfns, sources, patches)] if pfns.size else [header]
        return Batch(end, buffers, pfns.size, int(np.count_nonzero(sources == _ZERO)))

    def _find_zero(self, pfns: np.ndarray, sources: np.ndarray) -> None:
        """Change sources from _FRAME to _ZERO where the frame holds nothing else."""
        frames = np.flatnonzero(sources == _FRAME)
        mfns = self._p2m[pfns[frames]].astype(np.intp)
        doubtful = self._mem[mfns, 0] == 0
        if doubtful.any():
            zero = ~self._mem[mfns[doubtful]].any(axis=1)
            sources[frames[doubtful][zero]] = _ZERO

    def _runs(self, pfns: np.ndarray, sources: np.ndarray, patches: Patches) -> Iterator[Buffer]:
        """Yield the pages, cut where their source changes."""
        cuts = np.flatnonzero(np.diff(sources)) + 1
        for start, end in pairwise([0, *cuts.tolist(), pfns.size]):
            run = pfns[start:end]
            if sources[start] == _FRAME:
                yield Rows(self._mem, self._p2m[run])
            elif sources[start] == _PATCH:
                yield Rows(patches.pages, np.searchsorted(patches.pfns, run))
            else:
                yield Zeros(run.size * PAGE_SIZE)
