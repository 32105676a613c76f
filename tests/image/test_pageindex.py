"""An index of many PAGE_DATA records says what decoding them one by one says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave.errors import ImageError
from xsave.frames import PAGE_SIZE, PageType, type_has_data
from xsave.image import libxc
from xsave.image.buffers import reader
from xsave.image.pageindex import PageIndex, index_run
from xsave.image.stream import PageBatch, StreamDecoder, StreamEncoder

MAX_PFN = 1023
TYPES = sorted(set(PageType.__members__.values()))

batches = st.lists(
    st.lists(st.tuples(st.integers(0, MAX_PFN), st.sampled_from(TYPES)), min_size=1, max_size=9),
    max_size=6,
)


def record(entries):
    """Return a PAGE_DATA record; each page begins with its pfn."""
    pfns = np.array([pfn for pfn, _ in entries], np.uint64)
    types = np.array([kind for _, kind in entries], np.uint8)
    with_data = [pfn for pfn, kind in entries if type_has_data(kind)]
    pages = b"".join(pfn.to_bytes(8, "little").ljust(PAGE_SIZE, b"x") for pfn in with_data)
    return StreamEncoder.page_data_header(pfns, types) + pages


def image(records):
    """Return a libxc image with these records of pages, but no vCPU: cut off behind them."""
    head = StreamEncoder.headers("libxc")
    head += libxc.X86PvInfo(8, 4).encode() + libxc.StaticDataEnd().encode()
    frames = np.arange((MAX_PFN + 1) // 512, dtype=np.uint64)
    return head + libxc.X86PvP2mFrames(0, MAX_PFN, frames).encode() + b"".join(records)


def decoded(data, *, whole):
    """Return the items of an image up to its end or its first error, and that."""
    items, error = [], None
    decoder = StreamDecoder(reader(data), whole=memoryview(data) if whole else None)
    try:
        items += decoder
    except ImageError as e:
        error = str(e)
    return items, error


def joined(items):
    """Return pfns, types and offsets of the pages of all the PAGE_DATA records."""
    found = [
        PageIndex.of_batch(item.value) if isinstance(item.value, PageBatch) else item.value
        for item in items
        if isinstance(item.value, PageBatch | PageIndex)
    ]
    return [np.concatenate([[], *(getattr(f, a) for f in found)]).tolist() for a in
            ("pfns", "types", "offsets")]  # fmt: skip


@given(batches)
def test_as_one_by_one(batches):
    """The same pages at the same places, in one index; the bytes there are the page's."""
    data = image(map(record, batches))
    (one_by_one, first_error), (indexed, error) = (
        decoded(data, whole=whole) for whole in (False, True)
    )
    assert error == first_error
    assert sum(isinstance(item.value, PageIndex) for item in indexed) == bool(batches)
    assert joined(indexed) == joined(one_by_one)
    with_data = [pfn for batch in batches for pfn, kind in batch if type_has_data(kind)]
    for pfn, offset in zip(with_data, map(int, joined(indexed)[2]), strict=True):
        assert int.from_bytes(data[offset : offset + 8], "little") == pfn


@given(batches.filter(bool), st.data())
def test_damage_is_told_as_ever(batches, data):
    """A byte changed anywhere, or the end cut off: the same items before it, the same error."""
    whole = bytearray(image(map(record, batches)))
    start = len(image([]))
    if data.draw(st.booleans()):
        # Any of the header's bytes, and a few behind it, of one record.
        at = data.draw(st.integers(0, len(batches) - 1))
        offset = start + sum(len(record(batch)) for batch in batches[:at])
        offset += data.draw(st.integers(0, 16 + 8 * len(batches[at]) - 1))
        whole[offset] ^= data.draw(st.integers(1, 255))
    else:
        del whole[data.draw(st.integers(start, len(whole) - 1)) :]
    (one_by_one, first_error), (indexed, error) = (
        decoded(bytes(whole), whole=how) for how in (False, True)
    )
    assert error == first_error
    assert joined(indexed) == joined(one_by_one)


def test_nothing_before_the_p2m():
    """Pages in front of X86_PV_P2M_FRAMES are refused with an index, too."""
    head = StreamEncoder.headers("libxc") + libxc.X86PvInfo(8, 4).encode()
    data = head + libxc.StaticDataEnd().encode() + record([(1, 0)])
    assert "no X86_PV_P2M_FRAMES in front of it" in decoded(data, whole=True)[1]


@pytest.mark.parametrize("nr_good", [0, 1, 3])
def test_a_run_ends_in_front_of_what_is_odd(nr_good):
    """A record with a pfn that is too high is left to others, and what follows it."""
    data = b"".join([record([(1, 0)])] * nr_good + [record([(MAX_PFN + 1, 0)]), record([(2, 0)])])
    index = index_run(memoryview(data), 0, MAX_PFN)
    assert (index.pfns.tolist() if index else []) == [1] * nr_good
