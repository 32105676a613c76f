"""What the two ends of a post-copy migration say to each other once the guest runs at the target.

    target -> source   POSTCOPY_BEGIN { POSTCOPY_FAULT }, around the report of the hand-over
    source -> target   { POSTCOPY_PAGE_DATA } POSTCOPY_COMPLETE

    POSTCOPY_BEGIN      ::=                                              the guest is the target's
    POSTCOPY_FAULT      ::= count reserved pfn[count]                    wanted at once
    POSTCOPY_PAGE_DATA  ::= count reserved entry[count] page[entries of type NOTAB]
    POSTCOPY_COMPLETE   ::=                                              that was all

They are framed as the records of a libxc stream, an entry is that of PAGE_DATA: a page of type
XALLOC is empty, and has no bytes. The names are those of Joshua Otto's post-copy series for Xen
(2017), which was never merged, so no number of theirs is anybody's. The specification keeps
0x12 to 0x7fffffff for mandatory records to come and counts up from the lower end; ours are far
above. Mandatory, as who does not know them must not take the guest for complete.

No Construct here: the process that brings the pages reads this, and nothing else of images.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from xsave.frames import PAGE_SIZE, PageType

_FIRST = 0x4F50_5300  # "OPS"
BEGIN, PFNS_BEGIN, PFNS, TRANSITION, PAGE_DATA, COMPLETE, FAULT = range(_FIRST, _FIRST + 7)
NAMES = {
    BEGIN: "POSTCOPY_BEGIN",
    PFNS_BEGIN: "POSTCOPY_PFNS_BEGIN",
    PFNS: "POSTCOPY_PFNS",
    TRANSITION: "POSTCOPY_TRANSITION",
    PAGE_DATA: "POSTCOPY_PAGE_DATA",
    COMPLETE: "POSTCOPY_COMPLETE",
    FAULT: "POSTCOPY_FAULT",
}
#: Pages of one POSTCOPY_PAGE_DATA, at most; what is waited for waits behind one of them.
MAX_PAGES = 64
#: Pfns of one POSTCOPY_FAULT, at most: one write to a pipe is not torn then (PIPE_BUF).
MAX_FAULTS = 256
HEADER = struct.Struct("<II")
_COUNT = struct.Struct("<II")
MAX_BODY = _COUNT.size + MAX_PAGES * (8 + PAGE_SIZE)
MAX_FAULT_BODY = _COUNT.size + 8 * MAX_FAULTS
_TYPE_SHIFT = np.uint64(60)
_PFN_MASK = np.uint64((1 << 52) - 1)
_XALLOC = np.uint64(PageType.XALLOC) << _TYPE_SHIFT


@dataclass(frozen=True, eq=False)
class Pages:
    """One POSTCOPY_PAGE_DATA: pfns (n,) i64, is_empty (n,) bool; pages (m, 4096) u8 of the others,
    in their order."""

    pfns: np.ndarray
    is_empty: np.ndarray
    pages: np.ndarray


def begin() -> bytes:
    """Return a POSTCOPY_BEGIN."""
    return HEADER.pack(BEGIN, 0)


def complete() -> bytes:
    """Return a POSTCOPY_COMPLETE."""
    return HEADER.pack(COMPLETE, 0)


def fault(pfns: list[int]) -> bytes:
    """Return a POSTCOPY_FAULT; at most MAX_FAULTS pfns."""
    body = _COUNT.pack(len(pfns), 0) + np.array(pfns, "<u8").tobytes()
    return HEADER.pack(FAULT, len(body)) + body


def faulted(body: bytes | memoryview) -> np.ndarray:
    """Return the pfns (n,) i64 of a POSTCOPY_FAULT's body. Raises ValueError."""
    count, _ = _COUNT.unpack_from(body)
    if not 0 < count <= MAX_FAULTS or len(body) != _COUNT.size + 8 * count:
        raise ValueError(f"{len(body)} bytes for {count} pfns")
    return np.frombuffer(body, "<u8", count, _COUNT.size).astype(np.int64)


def page_data(pfns: np.ndarray, pages: np.ndarray) -> list[bytes | np.ndarray]:
    """Return the buffers of a POSTCOPY_PAGE_DATA of pages (n, 512) u64; empty ones go without."""
    empty = ~pages.any(axis=1)
    entries = pfns.astype(np.uint64)
    entries[empty] |= _XALLOC
    kept = np.ascontiguousarray(pages[~empty])
    length = _COUNT.size + entries.nbytes + kept.nbytes
    head = HEADER.pack(PAGE_DATA, length) + _COUNT.pack(pfns.size, 0) + entries.tobytes()
    return [head, kept] if kept.size else [head]


def pages_of(body: memoryview) -> Pages:
    """Return what a POSTCOPY_PAGE_DATA's body holds; views of it. Raises ValueError."""
    count, _ = _COUNT.unpack_from(body)
    if not 0 < count <= MAX_PAGES or len(body) < _COUNT.size + 8 * count:
        raise ValueError(f"{len(body)} bytes for {count} pages")
    entries = np.frombuffer(body, "<u8", count, _COUNT.size)
    types = entries >> _TYPE_SHIFT
    empty = types == np.uint64(PageType.XALLOC)
    nr_pages = int(np.count_nonzero(~empty))
    first = _COUNT.size + 8 * count
    if (types[~empty] != PageType.NOTAB).any() or len(body) != first + nr_pages * PAGE_SIZE:
        raise ValueError(f"{len(body)} bytes, or types, that do not fit {count} pages")
    pages = np.frombuffer(body, np.uint8, nr_pages * PAGE_SIZE, first).reshape(-1, PAGE_SIZE)
    return Pages((entries & _PFN_MASK).astype(np.int64), empty, pages)
