"""pages.py: PAGE_DATA, zero pages, holes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.image.strategies import batch, batches
from xsave.errors import ImageError
from xsave.image import pages
from xsave.image.buffers import Zeros
from xsave.image.lasttypes import LastTypes
from xsave.image.record import RECORD_HEADER


def split(data, offset=0):
    """Decode a framed PAGE_DATA record by the functions the stream decoder uses."""
    _, length = RECORD_HEADER.unpack(data[:8])
    header = pages.PageDataHeader.decode(data[8:16], offset=offset)
    pages.check_count(header, length, offset)
    end = 16 + 8 * header.count
    pfns, types, bits, nr_pages = pages.split_entries(memoryview(data)[16:end], length, offset)
    content = np.frombuffer(data[end:], np.uint8).reshape(nr_pages, 4096)
    return pages.PageBatch(pfns, types, content, end, header.reserved, bits)


@given(batches())
def test_batch_round_trip(value):
    """Any batch survives, with repeated pfns, reserved bits and entries without data."""
    data = value.encode()
    assert len(data) % 8 == 0
    assert len(data) == value.nbytes
    decoded = split(data)
    assert decoded.encode() == data
    assert decoded == value
    assert (decoded.pfns == value.pfns).all()
    assert (decoded.types == value.types).all()


def test_golden_batch():
    """Count, entries and pages lie as in the spec; XTAB has no page."""
    value = batch([5, 6], [0xF, 0x9], fill=0x41)
    expected = "01000000 18100000 02000000 00000000 05000000000000f0 0600000000000090"
    assert value.encode() == bytes.fromhex(expected) + b"\x41" * 4096


def test_types_without_data():
    """BROKEN, XALLOC and XTAB have no page; all other types have one."""
    found = pages.has_data(np.arange(16, dtype=np.uint8))
    assert np.flatnonzero(~found).tolist() == [0xD, 0xE, 0xF]


@pytest.mark.parametrize("page_type", [5, 6, 7, 8])
def test_reserved_types_are_refused(page_type):
    """Types 5 to 8 mean nothing, and the entry is named."""
    data = bytearray(batch([1, 2]).encode())
    data[16 + 15] = page_type << 4
    with pytest.raises(ImageError, match=f"entry 1: found {page_type:#x}"):
        split(bytes(data))


@pytest.mark.parametrize("count", [0, 2, 2**32 - 1])
def test_wrong_counts_are_refused(count):
    """A count of nothing, or one the record has no room for or no pages for, is refused."""
    data = bytearray(batch([1], [0xF]).encode())
    data[8:12] = count.to_bytes(4, "little")
    with pytest.raises(ImageError, match="wrong number of entries"):
        split(bytes(data))


def test_a_length_that_does_not_fit_the_types_is_refused():
    """The record's length must be that of its entries and pages."""
    data = bytearray(batch([1], [0]).encode())
    data[16 + 7] = 0xF0
    with pytest.raises(ImageError, match="wrong length: expected 16 bytes, found 4112 bytes"):
        split(bytes(data))


def test_a_batch_beyond_the_record_limit_is_not_written():
    """A record of more than 128 MiB is refused before a reader must."""
    nr = (128 << 20) // 4096
    with pytest.raises(ImageError, match="batch too long"):
        pages.page_data_header(np.arange(nr), np.zeros(nr, np.uint8))


@given(st.integers(0, 16), st.lists(st.sampled_from([None, 0, 1, 2047, 4095]), max_size=9))
def test_zero_pages_at_any_address(shift, marks):
    """Exactly the pages without a byte set are zero, wherever they lie in memory."""
    buffer = np.zeros(shift + 4096 * len(marks) + 16, np.uint8)
    found = buffer[shift : shift + 4096 * len(marks)].reshape(-1, 4096)
    for page, mark in zip(found, marks, strict=True):
        if mark is not None:
            page[mark] = 0x80
    buffer[:shift] = 0xFF  # neighbours must not matter
    buffer[shift + 4096 * len(marks) :] = 0xFF
    assert pages.zero_pages(found).tolist() == [mark is None for mark in marks]


@given(st.lists(st.booleans(), max_size=40))
def test_with_holes_keeps_the_bytes(zero):
    """The buffers are the pages again; only runs of at least MIN_HOLE_PAGES become Zeros."""
    zero = np.array(zero, bool)
    content = np.arange(1, len(zero) + 1, dtype=np.uint8).repeat(4096).reshape(-1, 4096)
    content[zero] = 0
    buffers = pages.with_holes(content, zero)
    joined = b"".join(bytes(b.nbytes) if isinstance(b, Zeros) else b.tobytes() for b in buffers)
    assert joined == content.tobytes()
    holes = [b.nbytes // 4096 for b in buffers if isinstance(b, Zeros)]
    assert all(n >= pages.MIN_HOLE_PAGES for n in holes)
    runs = [len(run) for run in "".join("01"[int(z)] for z in zero).split("0")]
    assert sum(holes) == sum(n for n in runs if n >= pages.MIN_HOLE_PAGES)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9) | st.just(2**52 - 1), st.integers(0, 15)), min_size=1)
    ),
    st.integers(1, 20),
)
def test_last_types_is_a_dictionary(entries, merge_at):
    """The last type of a pfn wins, across batches and inside one, whenever it merges."""
    model: dict[int, int] = {}
    last = LastTypes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xsave.image.lasttypes._MERGE_AT", merge_at)
        for one in entries:
            model.update(one)
            pfns, types = zip(*one, strict=True)
            last.add(np.array(pfns, np.uint64), np.array(types, np.uint8))
        pfns, types = last.result()
    assert dict(zip(pfns.tolist(), types.tolist(), strict=True)) == model
    assert pfns.tolist() == sorted(model)
