"""PAGE_DATA: a batch of pfns, their types, and the bytes of the pages that have any.

    PAGE_DATA ::= count reserved entry[count] page[entries with data]

An entry is a u64: type in bits 63-60, reserved bits 59-52, pfn in bits 51-0. BROKEN, XALLOC and
XTAB entries have no bytes. Everything is a whole-batch numpy operation. `pages` may be a view of a
memory map whose holes nobody should touch, so nothing here looks into it, except `zero_pages`,
whose caller asks for just that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xsave.errors import ImageError
from xsave.frames import PAGE_SIZE, PageType, type_has_data
from xsave.image.buffers import Buffer, Zeros
from xsave.image.record import MAX_BODY, RECORD_HEADER, Layout, layout, u32

TYPE, NAME = 0x01, "PAGE_DATA"
#: Entries per record that Xen's own writer uses at most (MAX_BATCH_SIZE).
MAX_BATCH = 1024
MAX_PFN = (1 << 52) - 1
#: A shorter run of zero pages is written: it would free few blocks, or none where the pages of
#: the image do not lie on block boundaries (they hardly ever do), and cost a system call.
MIN_HOLE_PAGES = 4

_PFN_MASK = np.uint64(MAX_PFN)
_HAS_DATA = np.array([type_has_data(t) for t in range(16)])
_IS_KNOWN = np.array([t in PageType.__members__.values() for t in range(16)])


@dataclass(frozen=True)
class PageDataHeader(Layout):
    """The first eight bytes of the body."""

    NAME = NAME
    LAYOUT = layout(count=u32, reserved=u32)

    count: int
    reserved: int = 0


@dataclass(frozen=True, eq=False)
class PageBatch:
    """One PAGE_DATA record. n entries, of which m have data.

    `pfns` u64 (n,), `types` u8 (n,), `pages` u8 (m, 4096) in the order of the entries with data;
    `pages_offset` is where in the image the first page begins. `reserved_bits` u8 (n,) are bits
    59-52 of the entries, None where all are zero.
    """

    pfns: np.ndarray
    types: np.ndarray
    pages: np.ndarray
    pages_offset: int = 0
    reserved: int = 0
    reserved_bits: np.ndarray | None = None

    TYPE = TYPE
    NAME = NAME

    @property
    def has_data(self) -> np.ndarray:
        """Which entries have a page: bool (n,)."""
        return has_data(self.types)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole record."""
        return RECORD_HEADER.size + PageDataHeader.size() + 8 * len(self.pfns) + self.pages.nbytes

    def header(self) -> bytes:
        """Return the record up to its first page."""
        return page_data_header(self.pfns, self.types, self.reserved, self.reserved_bits)

    def encode(self) -> bytes:
        """Return the whole record (a copy of all pages: for tests and small images)."""
        return self.header() + self.pages.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageBatch) and self.encode() == other.encode()

    __hash__ = None  # type: ignore[assignment]


def has_data(types: np.ndarray) -> np.ndarray:
    """Return which of these page types (u8, below 16) are followed by a page: bool, same shape."""
    found: np.ndarray = _HAS_DATA.take(types)
    return found


def is_known(types: np.ndarray) -> np.ndarray:
    """Return which of these page types (u8, below 16) the format knows: bool, same shape."""
    found: np.ndarray = _IS_KNOWN.take(types)
    return found


def page_data_header(
    pfns: np.ndarray,
    types: np.ndarray,
    reserved: int = 0,
    reserved_bits: np.ndarray | None = None,
) -> bytes:
    """Return record header, count and entries; the caller writes the pages behind it.

    The record's length is a multiple of 8 whatever the batch, so it needs no padding.
    """
    entries = np.asarray(pfns, "<u8") | (np.asarray(types).astype("<u8") << np.uint64(60))
    if reserved_bits is not None:
        entries |= reserved_bits.astype("<u8") << np.uint64(52)
    nr_pages = int(np.count_nonzero(has_data(types)))
    length = PageDataHeader.size() + entries.nbytes + nr_pages * PAGE_SIZE
    if length > MAX_BODY:
        raise ImageError("batch too long", record=NAME, expected=MAX_BODY, found=length)
    head = RECORD_HEADER.pack(TYPE, length) + PageDataHeader(len(entries), reserved).encode()
    body: bytes = entries.tobytes()
    return head + body


def check_count(header: PageDataHeader, length: int, offset: int) -> None:
    """Refuse a batch with no entries, or with more than its record of `length` bytes can hold."""
    room = (length - PageDataHeader.size()) // 8
    if not 1 <= header.count <= room:
        header.refuse(offset, "wrong number of entries", f"1 to {room}", header.count)


def split_entries(
    data: memoryview, length: int, offset: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, int]:
    """Return pfns, types, reserved bits and how many pages follow; refuse unknown types and a
    record `length` that does not fit them. `offset` is that of the record."""
    entries = np.frombuffer(data, "<u8")
    pfns = entries & _PFN_MASK
    types = (entries >> np.uint64(60)).astype(np.uint8)
    reserved_bits = (entries >> np.uint64(52)).astype(np.uint8)
    if not (known := _IS_KNOWN[types]).all():
        i = int(np.argmin(known))
        PageDataHeader.refuse(offset, f"unknown page type of entry {i}", found=f"{types[i]:#x}")
    nr_pages = int(np.count_nonzero(has_data(types)))
    expected = PageDataHeader.size() + len(data) + nr_pages * PAGE_SIZE
    if length != expected:
        PageDataHeader.refuse(offset, "wrong length", f"{expected} bytes", f"{length} bytes")
    return pfns, types, reserved_bits if reserved_bits.any() else None, nr_pages


def zero_pages(pages: np.ndarray) -> np.ndarray:
    """Return which pages hold only zero bytes: bool (m,). Reads all of them.

    `pages` is u8 (m, 4096), contiguous, at any address: whole words are compared from the first
    aligned one on, the bytes at the two ends of each page apart, as numpy is slow across words.
    """
    nr_pages = len(pages)
    if not nr_pages:
        return np.zeros(0, bool)
    head = -pages.ctypes.data % 8
    nr_words = (PAGE_SIZE - head) // 8
    words = pages[:, head : head + 8 * nr_words].view(np.uint64)
    zero: np.ndarray = np.bitwise_or.reduce(words, axis=1) == 0
    if head:
        zero &= ~pages[:, :head].any(axis=1) & ~pages[:, head + 8 * nr_words :].any(axis=1)
    return zero


def with_holes(pages: np.ndarray, zero: np.ndarray) -> list[Buffer]:
    """Return the buffers of these pages u8 (m, 4096), long runs of `zero` ones as Zeros.

    `zero` is bool (m,); where it is True the page is not looked at, if its run is long enough.
    """
    edges = np.flatnonzero(np.diff(zero)) + 1
    starts = [0, *edges.tolist()]
    ends = [*edges.tolist(), len(pages)]
    buffers: list[Buffer] = []
    data_start = 0
    for start, end in zip(starts, ends, strict=True):
        if start < len(zero) and zero[start] and end - start >= MIN_HOLE_PAGES:
            buffers += [pages[data_start:start], Zeros((end - start) * PAGE_SIZE)]
            data_start = end
    return [buffer for buffer in (*buffers, pages[data_start:]) if buffer.nbytes]
