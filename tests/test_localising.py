"""Localising ahead: whatever is done while records come, in the end the tables are the same; and no
frame of a pinned table changes or goes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_placing import StandIn
from xsave.canonical import localise
from xsave.errors import ImageError
from xsave.frames import INVALID_P2M_ENTRY, PAGE_SIZE, PTE_PRESENT, PageType
from xsave.image.pages import PageBatch
from xsave.localising import Localiser
from xsave.placing import Memory

SIZE = 24
GROWN = 40
_INVALID = np.uint64(INVALID_P2M_ENTRY)


class Door(StandIn):
    """A domctl that pins most L1 tables, and knows what may not happen to them meanwhile."""

    def __init__(self):
        super().__init__()
        self.pinned = {}
        self.nr_pinned = self.unpinning = 0
        self.machine.free = self.free_frames

    def pin_l1s(self, mfns):
        found = []
        for mfn in mfns.tolist():
            table = self.machine.mem[mfn]
            named = (table[table & np.uint64(PTE_PRESENT) != 0] >> np.uint64(12)).astype(int)
            assert (self.machine.m2p[named] != _INVALID).all()
            assert mfn not in self.pinned
            found.append(mfn % 5 != 0)  # some are not valid yet, for whatever reason
            if found[-1]:
                self.pinned[mfn] = table.copy()
        self.nr_pinned += sum(found)
        return np.array(found, bool)

    def ask_unpin(self, mfns):
        assert self.pinned.keys() >= set(mfns.tolist())
        self.unpinning += 1

        def wait():
            """Until somebody waits it may not have happened."""
            self.unpinning -= 1
            for mfn in mfns.tolist():
                assert np.array_equal(self.pinned.pop(mfn), self.machine.mem[mfn])

        return wait

    def ask_pin(self, mfns, levels, own, ahead):
        assert not self.pinned.keys() & set(mfns.tolist())
        self.ask_unpin(ahead)()
        self.asked = dict(zip(mfns.tolist(), levels.tolist(), strict=True))
        self.pinned |= {mfn: self.machine.mem[mfn].copy() for mfn in mfns[own].tolist()}

    def write_frames(self, mfns, pages, rows):
        assert not self.pinned.keys() & set(mfns.tolist())
        super().write_frames(mfns, pages, rows)

    def free_frames(self, mfns):
        for table in self.pinned.values():
            assert not np.isin(mfns << np.uint64(12) | np.uint64(PTE_PRESENT), table).any()
        assert not self.pinned.keys() & set(mfns.tolist())
        self.machine.m2p[mfns.astype(np.intp)] = _INVALID
        self.given_back.extend(mfns.tolist())


def table_of(targets):
    """A canonical page table that names these pfns."""
    table = np.zeros(512, np.uint64)
    table[1 : 1 + len(targets)] = np.array(targets, np.uint64) << np.uint64(12)
    table[1 : 1 + len(targets)] |= np.uint64(PTE_PRESENT)
    table[100] = np.uint64(3 << 12)  # not present
    return table


def record(entries):
    """A record of (pfn, kind, targets)."""
    types, pages = [], []
    for pfn, kind, targets in entries:
        types.append(kind)
        if kind == PageType.NOTAB:
            pages.append(np.full(512, pfn + 1, np.uint64))
        elif kind in (PageType.L1TAB, PageType.L1TAB_PINNED):
            pages.append(table_of(targets))
    data = np.array(pages, np.uint64).reshape(-1, 512).view(np.uint8).reshape(-1, PAGE_SIZE)
    pfns = np.array([pfn for pfn, _, _ in entries], np.uint64)
    return PageBatch(pfns, np.array(types, np.uint8), data, 1000)


entries = st.tuples(
    st.integers(0, SIZE - 1),
    st.sampled_from(
        [PageType.L1TAB] * 3
        + [PageType.NOTAB, PageType.XTAB, PageType.XALLOC, PageType.L1TAB_PINNED]
    ),
    st.lists(st.integers(0, SIZE - 1), max_size=6),
)
steps = st.tuples(
    st.lists(entries, min_size=1, max_size=12), st.integers(0, 5), st.sampled_from([SIZE, GROWN])
)


def replay(sequence):
    """Place these records, with so much work ahead behind each; return all that matters."""
    door = Door()
    memory = Memory(door, SIZE)
    localiser = Localiser(door, memory)
    last = {}
    for number, (record_entries, nr_ahead, size) in enumerate(sequence):
        memory.grow(size)
        memory.place(record(record_entries), None, 1000 * number)
        last |= {pfn: (kind, targets) for pfn, kind, targets in record_entries}
        for _ in range(nr_ahead):
            if not localiser.work_ahead():
                break
    localiser.run()
    assert not door.unpinning  # the frames of what is no table any more may change
    tables = {pfn for pfn, (kind, _) in last.items() if kind < PageType.BROKEN and kind & 7}
    own = {pfn for pfn in tables if last[pfn][0] == PageType.L1TAB_PINNED}
    ahead = {pfn for pfn in tables if int(memory.p2m[pfn]) in door.pinned}
    assert len(ahead) == len(door.pinned)
    localiser.ask_pin()
    # What is pinned cannot be again.
    assert door.asked == {int(memory.p2m[pfn]): 1 for pfn in tables - ahead}
    assert door.pinned.keys() == {int(memory.p2m[pfn]) for pfn in own}
    memory.complete()
    return door, memory, last


@given(st.lists(steps, max_size=8))
def test_the_tables_are_as_if_done_at_the_end(sequence):
    """Tables that come again, become data or holes, name pages that go or are not there yet."""
    door, memory, last = replay(sequence)
    named = {t for k, ts in last.values() if k & 7 == 1 and k < PageType.BROKEN for t in ts}
    for pfn, (kind, targets) in last.items():
        there = kind != PageType.XTAB or pfn in named
        assert (memory.p2m[pfn] != _INVALID) == there, pfn
        if kind in (PageType.L1TAB, PageType.L1TAB_PINNED):
            expected = localise(table_of(targets)[None], memory.p2m)[0]
            assert np.array_equal(door.machine.mem[int(memory.p2m[pfn])], expected), pfn
    backed = memory.p2m[memory.p2m != _INVALID]
    assert len(set(backed.tolist())) == backed.size
    assert not set(backed.tolist()) & set(door.given_back)


@pytest.mark.parametrize("kind", [PageType.L1TAB, PageType.L1TAB_PINNED])
def test_it_is_done_ahead(kind):
    """Most of the work really is: at the end only what came since is left."""
    tables = [(pfn, kind, [pfn + 10]) for pfn in range(1, 8)]
    data = [(pfn, PageType.NOTAB, []) for pfn in range(11, 18)]
    early, late = tables[:3] + data, tables[3:]
    door, memory, _ = replay([(early, 9, SIZE), (late, 9, SIZE), ([tables[0]], 0, SIZE)])
    assert door.nr_pinned == sum(int(memory.p2m[pfn]) % 5 != 0 for pfn in range(1, 8))
    assert door.nr_pinned >= 4


def test_what_comes_without_bytes_is_unpinned():
    """Tables that become pages whose bytes come later, or never: nothing is written that would
    have waited for them."""
    tables = [(pfn, PageType.L1TAB, [pfn + 10]) for pfn in range(1, 8)]
    data = [(pfn, PageType.NOTAB, []) for pfn in range(11, 18)]
    later = [(pfn, PageType.XALLOC, []) for pfn in range(1, 8)]
    door, _, _ = replay([(tables + data, 9, SIZE), (later, 0, SIZE)])
    assert door.nr_pinned >= 4
    assert not door.pinned


def test_errors_are_those_of_the_end():
    """A table that leads out of the p2m stays as it came until it is refused."""
    door = Door()
    memory = Memory(door, SIZE)
    localiser = Localiser(door, memory)
    memory.place(record([(4, PageType.L1TAB, [SIZE + 3])]), None, 0)
    assert not localiser.work_ahead()
    with pytest.raises(ImageError, match="outside the p2m") as caught:
        localiser.run()
    assert caught.value.offset == 1000 + 8
