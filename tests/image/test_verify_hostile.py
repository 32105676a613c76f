"""`verify` ends in findings for any bytes, in bounded memory, and never in a traceback."""

from __future__ import annotations

import struct
import tracemalloc
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.image.pieces import Piece, index, replaced
from tests.image.synthetic import L1_USER, L4, NR_PFNS, P2M, PvImage
from tests.image.synthetic_kinds import HvmImage
from xsave.image import libxc
from xsave.image.buffers import reader
from xsave.image.pages import PageBatch
from xsave.image.verify import Finding, verify
from xsave.image.verify.rules import RULES

MIB = 1 << 20


@cache
def sound(kind=PvImage):
    """Return the bytes of a sound image and where its pieces begin."""
    pieces = kind().pieces()
    starts = np.cumsum([0] + [len(piece.data) for piece in pieces]).tolist()
    return b"".join(piece.data for piece in pieces), starts


def errors_of(data):
    """Return the findings that are errors; all findings must be well formed."""
    findings = verify(reader(data))
    for finding in findings:
        assert isinstance(finding, Finding)
        assert finding.severity == RULES[finding.rule][0]
        assert "\n" not in finding.message
    return [finding for finding in findings if finding.severity == "error"]


@pytest.mark.parametrize("kind", [PvImage, HvmImage])
def test_cut_at_every_record(kind):
    """Cut at the start of any record or one byte behind it, an image is damaged, and the finding
    tells where it ends."""
    data, starts = sound(kind)
    for start in sorted(set(starts)):
        for end in (start, start + 1):
            if end < len(data):
                (finding,) = errors_of(data[:end])
                assert finding.rule == "damaged"
                assert finding.offset is not None
                assert finding.offset <= end


@given(data=st.data())
def test_cut_anywhere(data):
    """Cut anywhere, an image is damaged."""
    image, _ = sound()
    end = data.draw(st.integers(0, len(image) - 1))
    assert [finding.rule for finding in errors_of(image[:end])] == ["damaged"]


def head_bytes(data, starts):
    """Return the positions of the image that are no page content."""
    return [p for start, end in pairwise(starts) for p in range(start, min(end, start + 48))]


@given(data=st.data())
def test_flipped_bytes(data):
    """Whatever a few wrong bytes do, the answer is a list of findings."""
    image, starts = sound(data.draw(st.sampled_from([PvImage, HvmImage])))
    broken = bytearray(image)
    for _ in range(data.draw(st.integers(1, 4))):
        places = head_bytes(image, starts)
        anywhere = st.one_of(st.sampled_from(places), st.integers(0, len(image) - 1))
        broken[data.draw(anywhere)] ^= data.draw(st.integers(1, 255))
    errors_of(bytes(broken))


@given(data=st.data())
def test_random_page_tables(data):
    """Any entries in any tables end in findings."""
    image = PvImage()
    entries = st.tuples(st.integers(L4, L1_USER), st.integers(0, 511), st.integers(0, 2**64 - 1))
    for pfn, slot, value in data.draw(st.lists(entries, max_size=8)):
        image.table(pfn)[slot] = value
    errors_of(image.encode("libxc"))


@given(data=st.data())
def test_random_contexts(data):
    """Any bytes in the records of a vCPU, in start_info and shared_info end in findings."""
    image = PvImage()
    blobs = {cls.NAME: cls for cls in (libxc.X86PvVcpuBasic, libxc.X86PvVcpuExtended)}
    blobs |= {cls.NAME: cls for cls in (libxc.X86PvVcpuXsave, libxc.X86PvVcpuMsrs)}
    name = data.draw(st.sampled_from([*blobs, "SHARED_INFO", "HVM_PARAMS"]))
    body = data.draw(st.binary(max_size=6000))

    def edit(pieces):
        if name in blobs:
            record = struct.pack("<II", blobs[name].TYPE, 8 + len(body)) + bytes(8) + body
            return replaced(pieces, name, record + bytes(-len(body) % 8))
        content = (body + bytes(4096))[:4096]
        return replaced(pieces, "SHARED_INFO", libxc.SharedInfo(content).encode())

    errors_of(image.encode("libxc", edit))


@given(st.binary(max_size=400), st.sampled_from(["", "image header", "X86_PV_INFO", "END"]))
def test_any_bytes(junk, behind):
    """Any bytes, by themselves or behind a sound beginning, end in findings; by themselves they
    are damaged."""
    if not behind:
        assert errors_of(junk)
        return
    pieces = PvImage().pieces("libxc")
    head = b"".join(piece.data for piece in pieces[: index(pieces, behind)])
    errors_of(head + junk)


def peak_of(data):
    """Return the findings' rules and the most memory that verify took at a time."""
    view = memoryview(data)
    tracemalloc.start()
    try:
        rules = {finding.rule for finding in verify(reader(view))}
        return rules, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def with_records(records, before="X86_PV_P2M_FRAMES"):
    """Return a libxc image with these records in place of its memory."""
    pieces = PvImage().pieces("libxc")
    return b"".join(p.data for p in pieces[: index(pieces, before)]) + b"".join(records)


def test_hostile_p2m_size():
    """A p2m said to span 4 G pfns takes no memory for pfns that never come."""
    end = 2**32 - 1
    frames = np.full(end // 512 + 1, P2M, np.uint64)
    record = libxc.X86PvP2mFrames(0, end, frames).encode()
    pages = [piece.data for piece in PvImage().batches()]
    rest = [piece.data for piece in PvImage().pieces("libxc") if "VCPU" in piece.name]
    data = with_records([record, *pages, *rest, bytes(8)])
    rules, peak = peak_of(data)
    assert "coverage" in rules
    assert peak < 8 * len(record)


def test_hostile_p2m_list_far_away():
    """A list for the highest pfn alone takes no memory for those below it."""
    frames = np.array([P2M], np.uint64)
    record = libxc.X86PvP2mFrames(2**32 - 1, 2**32 - 1, frames).encode()
    rules, peak = peak_of(with_records([record] * 1000))
    assert {"p2m-frames", "damaged"} == rules
    assert peak < 4 * MIB


def test_hostile_pfns():
    """Entries that name pfns far apart take memory for the entries, not for what is between."""
    step = np.uint64(1 << 30)
    pfns = np.arange(200_000, dtype=np.uint64) * step
    types = np.full(len(pfns), 0xF, np.uint8)
    batch = PageBatch(pfns, types, np.zeros((0, 4096), np.uint8)).encode()
    pieces = HvmImage().pieces("libxc")
    at = index(pieces, "PAGE_DATA")
    data = b"".join(p.data for p in [*pieces[:at], Piece("", batch), *pieces[at:]])
    _, peak = peak_of(data)
    assert peak < 20 * len(batch)


def test_hostile_repeats():
    """The same pfns sent for ever take memory once."""
    pfns = np.arange(NR_PFNS, dtype=np.uint64)
    types = np.full(NR_PFNS, 0xF, np.uint8)
    batch = PageBatch(pfns, types, np.zeros((0, 4096), np.uint8)).encode()
    pieces = HvmImage().pieces("libxc")
    head = b"".join(piece.data for piece in pieces[: index(pieces, "PAGE_DATA")])
    rules, peak = peak_of(head + batch * 10_000)
    assert rules == {"damaged"}
    assert peak < 80 * MIB  # 2.5 million entries; what waits to be merged is bounded


def test_hostile_tables(monkeypatch):
    """An image that is nothing but full page tables is kept up to the limit only."""
    monkeypatch.setattr("xsave.image.verify.tables.MAX_ENTRIES", 100_000)
    image = PvImage()
    pages = np.full((100, 4096), 0x11, np.uint8)
    types = np.full(100, 1, np.uint8)
    frames = libxc.X86PvP2mFrames(0, 4095, np.full(8, P2M, np.uint64)).encode()
    batches = [
        PageBatch(np.arange(i, i + 100, dtype=np.uint64), types, pages).encode()
        for i in range(0, 4000, 100)
    ]
    rest = [piece.data for piece in image.pieces("libxc") if "VCPU" in piece.name]
    rules, peak = peak_of(with_records([frames, *batches, *rest, bytes(8)]))
    assert "tables-skipped" in rules
    assert peak < 16 * MIB
