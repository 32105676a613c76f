"""Placing: whatever comes in whatever order, each pfn's frame holds what came last for it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave.errors import ImageError, OutOfFrames, StorageError
from xsave.frames import INVALID_P2M_ENTRY, PAGE_SIZE, PageType
from xsave.image.pages import PageBatch
from xsave.placing import Memory

NR_FRAMES = 4096
TABLES = (7, 8)
VALUES = (None, -1, 0, 0, 1, 2, 255, *TABLES)
P2M_SIZE = 300


class StandIn:
    """A domctl with zeroed frames that are handed out shuffled."""

    def __init__(self, nr_free=NR_FRAMES):
        self.free = np.random.default_rng(1).permutation(NR_FRAMES)[:nr_free].astype(np.uint64)
        self.given_back = []
        pages = np.zeros((NR_FRAMES, PAGE_SIZE), np.uint8)
        m2p = np.full(NR_FRAMES, INVALID_P2M_ENTRY, np.uint64)
        self.machine = SimpleNamespace(
            pages=pages,
            mem=pages.view(np.uint64),
            m2p=m2p,
            nr_frames=NR_FRAMES,
            free=self.given_back.extend,
            write_frames=self.write_frames,
        )

    def write_frames(self, mfns, pages, rows):
        assert len(set(mfns.tolist())) == len(mfns)
        self.machine.pages[mfns.astype(np.intp)] = pages[rows]

    def populate(self, nr):
        if nr > self.free.size:
            raise OutOfFrames(wanted=nr, free=self.free.size, host="h")
        mfns, self.free = self.free[:nr], self.free[nr:]
        return mfns


def batch(values, at=0):
    """A record of (pfn, value): a page full of the value, no frame for None, no data for -1.

    One of TABLES is a page table, by its type."""
    pfns = np.array([pfn for pfn, _ in values], np.uint64)
    kinds = {None: PageType.XTAB, -1: PageType.XALLOC}
    kinds_with_data = dict.fromkeys(TABLES, PageType.L2TAB_PINNED)
    types = [(kinds | kinds_with_data).get(value, PageType.NOTAB) for _, value in values]
    rows = [np.full(PAGE_SIZE, value, np.uint8) for _, value in values if value not in kinds]
    for row in rows[::2]:
        row[:-1] = 0  # not zero, though its first word is
    data = b"?" * at + b"".join(row.tobytes() for row in rows)  # at any address
    pages = np.frombuffer(data, np.uint8)[at:].reshape(-1, PAGE_SIZE)
    return PageBatch(pfns, np.array(types, np.uint8), pages, 1000)


records = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, P2M_SIZE - 1), st.sampled_from([None, -1, 0, 0, 1, 2, 255, *TABLES])
        ),
        min_size=1,
        max_size=40,
    ),
    max_size=12,
)


@given(records, st.integers(0, 8), st.booleans())
def test_the_last_one_counts(records, at, holes_are_known):
    """Each pfn has one frame of its own, with the bytes that came last; m2p is p2m's inverse;
    a page that never held anything is not written."""
    domctl = StandIn()
    memory = Memory(domctl, P2M_SIZE)
    expected, ever = {}, set()
    for values in records:
        record = batch(values, at)
        zero = ~record.pages.any(axis=1)
        memory.place(record, zero if holes_are_known else None, 0)
        with_data = iter(record.pages)
        for pfn, value in values:
            if value is not None:
                ever.add(pfn)
            if value not in (None, -1):
                expected[pfn] = bytes(next(with_data))
    memory.complete()
    assert set(np.flatnonzero(memory.p2m != INVALID_P2M_ENTRY).tolist()) == ever
    assert memory.nr_populated == len(ever)
    mfns = memory.p2m[sorted(ever)].astype(np.intp)
    assert len(set(mfns.tolist())) == len(ever)
    assert domctl.machine.m2p[mfns].tolist() == sorted(ever)
    for pfn in ever:
        content = domctl.machine.pages[int(memory.p2m[pfn])]
        assert bytes(content) == expected.get(pfn, bytes(PAGE_SIZE))
    assert np.count_nonzero(domctl.machine.pages.any(axis=1)) <= len(expected)


def test_the_last_frames_will_do():
    """Frames are asked for in large numbers, but a machine that has just enough is enough."""
    domctl = StandIn(nr_free=20)
    memory = Memory(domctl, P2M_SIZE)
    memory.place(batch([(pfn, 1) for pfn in range(20)]), None, 0)
    with pytest.raises(OutOfFrames):
        memory.place(batch([(20, 1)]), None, 0)
    memory.stop()


def test_what_is_left_is_given_back():
    """Frames that were taken and not needed are freed, no others."""
    domctl = StandIn()
    memory = Memory(domctl, P2M_SIZE)
    memory.place(batch([(7, 1)]), None, 0)
    memory.complete()
    memory.give_back_pool()
    assert len(domctl.given_back) + 1 == NR_FRAMES - domctl.free.size
    assert int(memory.p2m[7]) not in domctl.given_back


def test_a_pfn_outside_is_refused():
    """A pfn beyond the p2m is an ImageError that names it, and nothing is placed."""
    domctl = StandIn()
    memory = Memory(domctl, P2M_SIZE)
    with pytest.raises(ImageError, match=f"{P2M_SIZE:#x}"):
        memory.place(batch([(1, 1), (P2M_SIZE, 1)]), None, 77)
    memory.complete()
    assert not domctl.machine.pages.any()


@given(records)
def test_tables_are_there_first(records):
    """While other pages may still be on their way, all page tables are in their frames, also
    those that were no tables when they came before."""
    domctl = StandIn()
    memory = Memory(domctl, P2M_SIZE)
    expected = {}
    for values in records:
        memory.place(batch(values), None, 0)
        for pfn, value in values:
            expected[pfn] = value
    pfns = np.array(sorted(pfn for pfn, v in expected.items() if v in TABLES), np.intp)
    last = memory.read_tables(pfns).view(np.uint8)[:, -1]
    assert last.tolist() == [expected[pfn] for pfn in pfns.tolist()]
    memory.complete()


def test_nothing_is_written_after_stop():
    """When stop() returns the frames may go to another domain: nothing writes to them."""
    domctl = StandIn()
    calls = []

    def write_slowly(mfns, pages, rows):
        time.sleep(0.02)
        calls.append(rows.size)

    domctl.machine.write_frames = write_slowly
    memory = Memory(domctl, P2M_SIZE)
    for first in range(0, P2M_SIZE, 10):
        memory.place(batch([(first + i, 1) for i in range(10)]), None, 0)
    time.sleep(0.03)
    memory.stop()
    after = list(calls)
    time.sleep(0.1)
    assert calls == after
    assert 0 < len(after) < 5


def test_a_write_that_fails_is_raised():
    """What goes wrong in the thread reaches the restore."""
    domctl = StandIn()

    def fail(*_):
        raise StorageError("no space")

    domctl.machine.write_frames = fail
    memory = Memory(domctl, P2M_SIZE)
    memory.place(batch([(1, 1)]), None, 0)
    with pytest.raises(StorageError):
        memory.complete()


def test_what_was_written_early_counts_as_written():
    """A page of zeros over it is zeros: a fresh frame would not have been touched."""
    domctl = StandIn()
    memory = Memory(domctl, P2M_SIZE)
    memory.place(batch([(3, 0)]), None, 0)
    memory.write_early(np.array([3]), np.full((1, 512), 9, np.uint64))
    memory.place(batch([(3, 0)]), None, 0)
    memory.complete()
    assert not domctl.machine.pages[int(memory.p2m[3])].any()
