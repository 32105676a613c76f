"""From frames to PAGE_DATA: the pages of a domain, a batch of pfns at a time.

Nothing is copied here. A record's buffers name the frames (`Rows`), which lie shuffled in machine
memory, and the kernel or a compressor fetches them. Frames that nobody touched are known without
reading them, of the others the first word nearly always says that they are not zero; what is
zero leaves as `Zeros`. A few pages are not written as their frames hold them: page tables, the
p2m, start_info. They come as Patches. Whole batches only, nothing is done page by page; what is
looked up for many batches together is looked up when they are due, so that the first ones are on
their way at once.

Of a running domain not all pfns are written each time, nor need they be read from their frames
(guest/xen/logdirty.py). And an empty page that the other end has never had anything else of can
go as XALLOC, eight bytes, where that end is known to give out empty frames only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from xsave.frames import PAGE_SIZE, PageType
from xsave.guest.xen.domctl import Domctl
from xsave.image.buffers import Buffer, Rows, Zeros
from xsave.image.pages import MAX_BATCH, has_data
from xsave.image.stream import StreamEncoder

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

    def among(self, pfns: np.ndarray) -> Patches:
        """Return those of these pfns (n,), ascending, at least one."""
        start, stop = np.searchsorted(self.pfns, (pfns[0], pfns[-1] + 1))
        some, pages = self.pfns[start:stop], self.pages[start:stop]
        if some.size and pfns.size <= pfns[-1] - pfns[0]:  # there are gaps
            wanted = np.isin(some, pfns, assume_unique=True)
            some, pages = some[wanted], pages[wanted]
        return Patches(some, pages)


class Frames(Protocol):
    """Where pages are read from: rows (nr_frames, 512) u64, and which of these mfns were ever
    touched; the others hold zeros."""

    pages: np.ndarray

    def touched(self, mfns: np.ndarray) -> np.ndarray: ...


class OwnFrames:
    """The frames themselves."""

    def __init__(self, domctl: Domctl) -> None:
        self.pages = domctl.machine.mem
        self.touched = domctl.machine.resident


@dataclass(frozen=True)
class Batch:
    """One PAGE_DATA record as buffers. Frames of a guest that runs change under them; what was
    found to be zero is sent as that."""

    end_pfn: int
    buffers: list[Buffer]
    nr_pages: int
    zero_pages: int


class Gatherer:
    """The PAGE_DATA records of some pfns of a domain, in pfn order.

    p2m (n,) u64, types (n,) u8 (XTAB where p2m has no frame); patches(pfns): those of these pfns,
    which may turn types into XTAB. pfns (k,) intp, ascending: all, if None. unsent (n,) bool, if
    given: of those pfns the other end never had any bytes, and zeros need none; those that get
    some are taken out. skip(pfns), if given, which of them are left out, (n,) bool, asked when
    their turn comes.
    """

    def __init__(
        self,
        domctl: Domctl,
        p2m: np.ndarray,
        types: np.ndarray,
        patches: Callable[[np.ndarray], Patches],
        *,
        pfns: np.ndarray | None = None,
        frames: Frames | None = None,
        unsent: np.ndarray | None = None,
        skip: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._frames = frames or OwnFrames(domctl)
        self._mem = self._frames.pages
        self._p2m = p2m
        self._types = types
        self._patches_of = patches
        self._pfns = np.arange(p2m.size) if pfns is None else pfns
        self._unsent = unsent
        self._skip = skip

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self._pfns.size, _WINDOW):
            pfns = self._pfns[start : start + _WINDOW]
            patches = self._patches_of(pfns)
            sources = self._sources(pfns, patches)
            for first in range(0, pfns.size, MAX_BATCH):
                some, origin = pfns[first : first + MAX_BATCH], sources[first : first + MAX_BATCH]
                if self._skip is not None:
                    kept = ~self._skip(some)
                    some, origin = some[kept], origin[kept]
                if some.size:
                    yield self._batch(some, origin, patches)

    def _sources(self, pfns: np.ndarray, patches: Patches) -> np.ndarray:
        """Return where the pages of these pfns come from, (n,) u8."""
        sources = np.full(pfns.size, _ZERO, np.uint8)
        backed = has_data(self._types[pfns])
        touched = self._frames.touched(self._p2m[pfns[backed]])
        sources[backed] = np.where(touched, _FRAME, _ZERO)
        is_zero = ~patches.pages.any(axis=1)
        sources[np.searchsorted(pfns, patches.pfns)] = np.where(is_zero, _ZERO, _PATCH)
        return sources

    def _batch(self, pfns: np.ndarray, sources: np.ndarray, patches: Patches) -> Batch:
        types, end_pfn = self._types[pfns], int(pfns[-1]) + 1
        backed = np.flatnonzero(has_data(types))
        with_data, sources = pfns[backed], sources[backed]
        self._find_zero(with_data, sources)
        zero_pages = int(np.count_nonzero(sources == _ZERO))
        nr_pages = with_data.size
        if self._unsent is not None:
            empty = (sources == _ZERO) & (types[backed] == PageType.NOTAB)
            empty &= self._unsent[with_data]
            types[backed[empty]] = PageType.XALLOC
            with_data, sources = with_data[~empty], sources[~empty]
            self._unsent[with_data] = False
        header = StreamEncoder.page_data_header(pfns.astype(np.uint64), types)
        runs = self._runs(with_data, sources, patches) if with_data.size else ()
        return Batch(end_pfn, [header, *runs], nr_pages, zero_pages)

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
