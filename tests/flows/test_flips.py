"""Any byte of an image may be any other: a domain or an error, and nothing is left of either.

The invariant is in ruined.py. XSAVE_TEST_EXAMPLES says how many images the slow test tries (2000).
"""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.flows.ruined import PIECES, SOUND, error_of
from tests.image.synthetic import DATA, NR_PFNS
from xsave.image.buffers import reader
from xsave.image.stream import PageBatch, StreamDecoder

EXAMPLES = int(os.environ.get("XSAVE_TEST_EXAMPLES") or 2000)


def ranges():
    """Return (start, end) of every header and small record, and of every page but plain data."""
    found = []
    decoder = StreamDecoder(reader(SOUND))
    for item in decoder:
        batch = item.value
        if not isinstance(batch, PageBatch):
            found.append((item.offset, decoder.position))
            continue
        found.append((item.offset, batch.pages_offset))
        for row, pfn in enumerate(batch.pfns[batch.has_data].tolist()):
            if pfn < DATA:
                start = batch.pages_offset + 4096 * row
                found.append((start, start + 4096))
    return found


RANGES = ranges()
places = st.sampled_from(RANGES).flatmap(lambda range_: st.integers(range_[0], range_[1] - 1))
flips = st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=4)
words = st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, 7, NR_PFNS, 1 << 63])


def flipped(changes):
    """Return the image with some bytes changed."""
    image = bytearray(SOUND)
    for at, change in changes:
        image[at] ^= change
    return bytes(image)


def test_every_part_is_hit():
    """The ranges cover the headers, the records and the special pages, without a gap between."""
    small = sum(len(piece.data) for piece in PIECES if piece.name != "PAGE_DATA")
    assert sum(end - start for start, end in RANGES) > small + (DATA - 1) * 4096


@settings(max_examples=100)
@given(changes=flips)
def test_flipped_bits(world, changes):
    """Up to four bytes anywhere in the headers, records, page tables and special pages."""
    error_of(world, flipped(changes))


@settings(max_examples=60)
@given(at=places, word=words)
def test_flipped_words(world, at, word):
    """Eight bytes of any value in the same places: what flipped bits seldom hit."""
    image = bytearray(SOUND)
    image[at : at + 8] = struct.pack("<Q", word)[: len(image) - at]
    error_of(world, bytes(image))


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(changes=flips)
def test_many_flipped_bits(world, changes):
    """Many more of them."""
    error_of(world, flipped(changes))
