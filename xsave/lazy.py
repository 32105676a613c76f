"""A domain's memory while only the index of its image is read: the pages come when touched.

What a domain needs to run is put into its frames here: page tables and, by who settles the
domain, its p2m and start_info. Of all else is written down where in the file it is (Outstanding),
for the process that brings it. Of a page that lies in a hole of the file there is nothing to
bring. What was put here first is left alone by that process, whichever of the two is faster.
"""

from __future__ import annotations

import os
from typing import Protocol, Self

import numpy as np

from xsave.frames import INVALID_P2M_ENTRY
from xsave.guest.xen.domctl import Domctl
from xsave.guest.xen.outstanding import Outstanding
from xsave.image.pageindex import PageIndex
from xsave.image.pages import PageBatch, has_data
from xsave.placing import NO_PFNS, Memory, is_ascending

_INVALID = np.uint64(INVALID_P2M_ENTRY)


class WholeFile(Protocol):
    """An image in a plain file (xsave.host.source.FileSource)."""

    @property
    def whole(self) -> memoryview: ...
    @property
    def start(self) -> int: ...
    def fileno(self) -> int: ...
    def with_data(self, offsets: np.ndarray) -> np.ndarray: ...
    def read_pages(self, offsets: np.ndarray) -> np.ndarray: ...


class Lazy:
    """What a lazy restore shares with the process that will bring the pages."""

    def __init__(self, image: WholeFile, nr_frames: int) -> None:
        self.image = image
        self._tables = Outstanding.create(nr_frames)
        self.outstanding = Outstanding(self._tables)

    @property
    def descriptors(self) -> tuple[int, int]:
        """The image and the tables, as the domain's process wants to be given them."""
        return self.image.fileno(), self._tables

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._tables)


class LazyMemory(Memory):
    """Memory whose pages stay in the image until they are asked for."""

    def __init__(self, domctl: Domctl, p2m_size: int, lazy: Lazy) -> None:
        super().__init__(domctl, p2m_size)
        self._image = lazy.image
        self._outstanding = lazy.outstanding
        self._there = np.zeros(p2m_size, bool)

    def place(self, batch: PageBatch, zero: np.ndarray | None, offset: int) -> None:
        """A record by itself is nothing special."""
        self.place_index(PageIndex.of_batch(batch))

    def place_index(self, index: PageIndex) -> None:
        """Take many records; no pfn is outside the p2m."""
        self.place_types(index.pfns, index.types)
        self._offsets[index.pfns[has_data(index.types)]] = index.offsets

    def grow(self, p2m_size: int) -> None:
        super().grow(p2m_size)
        self._there = np.append(self._there, np.zeros(p2m_size - self._there.size, bool))

    def read_tables(self, pfns: np.ndarray) -> np.ndarray:
        with_bytes = self._with_data(pfns[self._offsets[pfns] != 0])
        tables = np.zeros((pfns.size, 512), np.uint64)
        pages = self._image.read_pages(self._offsets[with_bytes])
        tables[np.searchsorted(pfns, with_bytes)] = pages.view(np.uint64)
        return tables

    def write_tables(self, pfns: np.ndarray, tables: np.ndarray) -> None:
        self._there[pfns] = True
        self._machine.write_frames(self.p2m[pfns], tables.view(np.uint8), np.arange(pfns.size))

    def have(self, pfns: np.ndarray) -> None:
        pfns = pfns[(self._offsets[pfns] != 0) & ~self._there[pfns] & (self.p2m[pfns] != _INVALID)]
        self._there[pfns] = True
        pfns = self._with_data(pfns)
        pages = self._image.read_pages(self._offsets[pfns])
        self._machine.write_frames(self.p2m[pfns], pages, np.arange(pfns.size))

    def _with_data(self, pfns: np.ndarray) -> np.ndarray:
        """Return those of the pfns whose pages are not in holes, in the order of the image."""
        offsets = self._offsets[pfns]
        if not is_ascending(offsets):
            order = np.argsort(offsets)
            pfns, offsets = pfns[order], offsets[order]
        return pfns[self._image.with_data(offsets)]

    def complete(self, but: np.ndarray = NO_PFNS) -> None:
        wanted = (self._offsets != 0) & ~self._there & (self.p2m != _INVALID)
        wanted[but.view(np.int64)] = False
        pfns = self._with_data(np.flatnonzero(wanted))
        positions = self._offsets[pfns] + np.uint64(self._image.start)
        self._outstanding.put(self.p2m[pfns].astype(np.intp), positions)

    def serve(self) -> None:
        self._domctl.fill()
