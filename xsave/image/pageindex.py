"""Where in an image the pages are, without reading a page: runs of PAGE_DATA records at once.

An image that lies in memory as a whole (a mapped file) is walked from record header to record
header; of each record only its entries are looked at. Thousands of records become a few arrays, so
that an index of 8 GiB takes about as long as one of 64 MiB. What is in any way odd about a record
ends the run in front of it: the decoder of single records then says what is wrong, or takes it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from xsave.frames import PAGE_SIZE
from xsave.image import pages
from xsave.image.record import MAX_BODY

#: Record type, body length, count, reserved.
_HEAD = struct.Struct("<IIII")
_RECORD_HEADER_BYTES = 8
_PFN_MASK = np.uint64(pages.MAX_PFN)
_TYPE_SHIFT = np.uint64(60)


@dataclass(frozen=True, eq=False)
class PageIndex:
    """PAGE_DATA records without their pages. n entries, of which m have data.

    `pfns` i64 (n,), `types` u8 (n,), `offsets` u64 (m,): where in the image each page with data
    begins, ascending. `nbytes` is the length of all the records together.
    """

    pfns: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    nbytes: int

    NAME = pages.NAME

    @classmethod
    def of_batch(cls, batch: pages.PageBatch) -> PageIndex:
        """The index of one decoded record."""
        where = np.arange(len(batch.pages), dtype=np.uint64) * np.uint64(PAGE_SIZE)
        offsets = where + np.uint64(batch.pages_offset)
        return cls(batch.pfns.view(np.int64), batch.types, offsets, batch.nbytes)


def index_run(image: memoryview, position: int, max_pfn: int) -> PageIndex | None:
    """Return the index of the well-formed PAGE_DATA records from `position` on, up to the first
    other one; None if there is none. No pfn in it is above max_pfn."""
    starts, counts, lengths = _walk(image, position)
    if not starts:
        return None
    entries = np.concatenate(
        [
            np.frombuffer(image, "<u8", count, start + _HEAD.size)
            for start, count in zip(starts, counts, strict=True)
        ]
    )
    types = (entries >> _TYPE_SHIFT).astype(np.uint8)
    has_data = pages.has_data(types)
    pfns = (entries & _PFN_MASK).view(np.int64)  # indices of another type cost twice as much
    first = np.concatenate(([0], np.cumsum(counts)))
    nr_pages = np.add.reduceat(has_data, first[:-1], dtype=np.int64)
    expected = _HEAD.size - _RECORD_HEADER_BYTES + 8 * np.array(counts) + PAGE_SIZE * nr_pages
    good = (expected == np.array(lengths)) & ~np.logical_or.reduceat(
        ~pages.is_known(types) | (pfns > max_pfn), first[:-1]
    )
    nr_good = len(starts) if good.all() else int(np.argmin(good))
    if not nr_good:
        return None
    nr_entries = int(first[nr_good])
    pages_start = np.array(starts[:nr_good]) + _HEAD.size + 8 * np.array(counts[:nr_good])
    nr_pages = nr_pages[:nr_good]
    nr_before = np.cumsum(nr_pages) - nr_pages
    offsets = np.repeat(pages_start - PAGE_SIZE * nr_before, nr_pages)
    offsets += PAGE_SIZE * np.arange(offsets.size)
    end = starts[nr_good - 1] + _RECORD_HEADER_BYTES + lengths[nr_good - 1]
    return PageIndex(
        pfns[:nr_entries], types[:nr_entries], offsets.astype(np.uint64), end - position
    )


def _walk(image: memoryview, position: int) -> tuple[list[int], list[int], list[int]]:
    """Return starts, counts and lengths of what look like whole PAGE_DATA records."""
    starts, counts, lengths = [], [], []
    while position + _HEAD.size <= len(image):
        record_type, length, count, _ = _HEAD.unpack_from(image, position)
        end = position + _RECORD_HEADER_BYTES + length
        if record_type != pages.TYPE or length > MAX_BODY or end > len(image):
            break
        if not 1 <= count <= (length - 8) // 8:
            break
        starts.append(position)
        counts.append(count)
        lengths.append(length)
        position = end
    return starts, counts, lengths
