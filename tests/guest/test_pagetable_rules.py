"""The rules of page types, one by one, and the software walk of a guest's tables."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from tests.guest.pagetable_model import CODE, FORBIDDEN, REFUSED, XEN_ENTRIES
from tests.guest.rig import FULL, READ_ONLY, Guest
from xsave.frames import (
    PAGE_SHIFT,
    PTE_GLOBAL,
    PTE_PCD,
    PTE_PRESENT,
    PTE_PSE,
    PTE_PWT,
    PTE_RW,
    PTE_USER,
)
from xsave.guest.xen.machine import DOMID_FREE, M2P_FIRST_FRAME
from xsave.guest.xen.pagetable import PageTables
from xsave.guest.xen.pagetypes import PGT_L1, PGT_L2, PGT_L4, PGT_SEG_DESC, PGT_WRITABLE, PGT_XEN
from xsave.guest.xen.pins import Pins

DOMID = 1


@pytest.fixture
def tables(machine):
    """The page types of one domain with 16 frames, `tables.frames`."""
    made = PageTables(machine, DOMID, XEN_ENTRIES)
    made.frames = [int(mfn) for mfn in machine.allocate(DOMID, 16)]
    return made


def write(tables, mfn, slot, target, flags=FULL):
    assert tables.mmu_update((mfn << 12) + 8 * slot, target << 12 | flags) == 0


FORBIDDEN_FLAGS = [
    (level, flag)
    for level, flags in FORBIDDEN.items()
    for flag in (PTE_PSE, PTE_PWT, PTE_PCD, PTE_GLOBAL)
    if flags & flag
]


def refused_both_ways(tables, table, level, entry, rc=REFUSED):
    """An entry is refused in a table that is validated and in one that is in use."""
    assert tables.mmu_update((table << 12) + 8, entry) == 0
    assert tables.pin(table, level) == rc
    assert tables.mmu_update((table << 12) + 8, 0) == 0
    assert tables.pin(table, level) == 0
    assert tables.mmu_update((table << 12) + 8, entry) == rc
    assert tables.q[(table << 9) + 1] == 0
    assert not tables.count[tables.frames[1]]


@pytest.mark.parametrize(("level", "flag"), FORBIDDEN_FLAGS)
def test_forbidden_flags(tables, level, flag):
    """Superpages, cache attributes and (above L1) global entries are refused."""
    table, target = tables.frames[:2]
    refused_both_ways(tables, table, level, target << 12 | PTE_PRESENT | flag)


@pytest.mark.parametrize(("level", "flag"), FORBIDDEN_FLAGS)
def test_forbidden_flags_of_tables_in_use(tables, level, flag):
    """The same where many tables are pinned at once, and the entry names what is in use."""
    table, target, other = tables.frames[:3]
    if level > PGT_L1:
        assert tables.pin(target, level - 1) == 0
    pins, mfns = Pins(tables), np.array([table, other], np.uint64)
    write(tables, table, 1, target, PTE_PRESENT | flag)
    assert pins.pin(mfns, level).tolist() == [False, level > PGT_L1]
    assert not tables.refs[target]
    write(tables, table, 1, target, PTE_PRESENT)
    assert pins.pin(mfns, level).tolist() == [True, level == PGT_L1]
    assert tables.refs[target] == 1


@pytest.mark.parametrize("level", range(PGT_L1, PGT_L4 + 1))
@pytest.mark.parametrize("flags", [PTE_PRESENT, FULL])
@pytest.mark.parametrize(
    "whose", ["another's", "Xen's", "Xen's of this domain", "nobody's", "none", "INVALID_MFN"]
)
def test_forbidden_frames(tables, level, flags, whose):
    """No entry of any level names a frame that is not the guest's own, not even to read it: an L1
    entry is -EBUSY where there is memory, -EPERM where there is none."""
    machine = tables.machine
    own_of_xen = int(machine.allocate(DOMID, 1)[0])
    machine.page_type[own_of_xen] = PGT_XEN
    target = {
        "another's": int(machine.allocate(DOMID + 1, 1)[0]),
        "Xen's": M2P_FIRST_FRAME,
        "Xen's of this domain": own_of_xen,
        "nobody's": int(np.flatnonzero(machine.owner == DOMID_FREE)[0]),
        "none": machine.nr_frames,
        "INVALID_MFN": (1 << 40) - 1,
    }[whose]
    rc = {"none": -errno.EPERM, "INVALID_MFN": REFUSED}.get(whose, -errno.EBUSY)
    rc = rc if level == PGT_L1 else REFUSED
    refused_both_ways(tables, tables.frames[0], level, target << 12 | flags, rc)
    assert not machine.refs[: machine.nr_frames].any()


def test_a_table_cannot_map_itself_writable(tables):
    """An L1 may map itself and other tables read-only, never writable."""
    l1 = tables.frames[0]
    write(tables, l1, 0, l1)
    assert tables.pin(l1, PGT_L1) == -errno.EBUSY
    assert (tables.ptype[l1], tables.count[l1], tables.refs[l1]) == (0, 0, 0)
    write(tables, l1, 0, l1, READ_ONLY)
    assert tables.pin(l1, PGT_L1) == 0
    assert tables.update_entry(l1, 0, l1 << 12 | FULL) == -errno.EBUSY
    assert tables.q[l1 << 9] == l1 << 12 | READ_ONLY


def test_a_page_mapped_writable_becomes_no_table(tables):
    """A frame with a writable mapping can be no table, and can once the mapping is gone."""
    l1, page = tables.frames[:2]
    write(tables, l1, 5, page)
    assert tables.pin(l1, PGT_L1) == 0
    for level in range(PGT_L1, PGT_L4 + 1):
        assert tables.pin(page, level) == REFUSED
    assert tables.get_type(page, PGT_SEG_DESC) == REFUSED
    assert tables.update_entry(l1, 5, 0) == 0
    assert tables.pin(page, PGT_L2) == 0


def test_a_table_in_use_has_one_level(tables):
    """A table of one level is none of another, not even through itself (linear page tables)."""
    l4, l3 = tables.frames[:2]
    write(tables, l4, 0, l3)
    assert tables.pin(l4, PGT_L4) == 0
    for level in (PGT_L1, PGT_L2, PGT_L4):
        assert tables.get_type(l3, level) == REFUSED
    assert tables.update_entry(l4, 1, l4 << 12 | FULL) == REFUSED
    assert tables.update_entry(l3, 1, l3 << 12 | FULL) == REFUSED


def test_a_refused_tree_leaves_nothing(tables):
    """A bad entry at the bottom of a tree refuses the whole of it, with the error of that entry,
    and no count stays."""
    l4, l3, l2, good, bad, page = tables.frames[:6]
    for table, slot, target in ((l4, 0, l3), (l3, 0, l2), (l2, 0, good), (l2, 1, bad)):
        write(tables, table, slot, target)
    write(tables, good, 0, page)
    write(tables, bad, 0, tables.nr_frames)
    assert tables.pin(l4, PGT_L4) == -errno.EPERM
    machine = tables.machine
    for column in (machine.page_type, machine.type_count, machine.refs, machine.pinned):
        assert not column[tables.frames].any()
    write(tables, bad, 0, page)
    assert tables.pin(l4, PGT_L4) == 0
    assert tables.count[page] == tables.refs[page] == 2


def test_an_l4_gets_xens_slots_and_loses_them(tables):
    """While a frame is an L4 it has Xen's entries, whatever the guest had there, and the guest
    cannot change them; afterwards they are zero: no mfn of Xen's is left to read."""
    l4 = tables.frames[0]
    for slot in range(256, 272):
        write(tables, l4, slot, tables.frames[1])
    assert tables.pin(l4, PGT_L4) == 0
    row = tables.machine.mem[l4]
    assert {i: int(e) for i, e in enumerate(row) if e} == XEN_ENTRIES
    for slot in (256, 263, 271):
        assert tables.update_entry(l4, slot, 0) == REFUSED
        assert tables.mmu_update((l4 << 12) + 8 * slot, 0) == REFUSED
    assert tables.update_entry(l4, 255, 0) == tables.update_entry(l4, 272, 0) == 0
    assert tables.unpin(l4) == 0
    assert not row.any()


def test_user_bits_are_forced(tables):
    """Every present entry of a table in use is user-accessible: the kernel runs in ring 3."""
    l1, page = tables.frames[:2]
    write(tables, l1, 0, page, PTE_PRESENT)
    assert tables.pin(l1, PGT_L1) == 0
    assert tables.update_entry(l1, 1, page << 12 | PTE_PRESENT) == 0
    assert tables.update_entry(l1, 2, page << 12) == 0
    assert [tables.q[(l1 << 9) + i] & 0xFFF for i in range(3)] == [5, 5, 0]


def test_preserved_bits(tables):
    """MMU_PT_UPDATE_PRESERVE_AD keeps the accessed and dirty bits of the old entry."""
    l1, page = tables.frames[:2]
    write(tables, l1, 0, page)
    assert tables.pin(l1, PGT_L1) == 0
    plain = page << 12 | PTE_PRESENT | PTE_USER
    assert tables.mmu_update(l1 << 12, plain, preserve_ad=True) == 0
    assert tables.q[l1 << 9] == plain | 0x60
    assert tables.mmu_update(l1 << 12, plain) == 0
    assert tables.q[l1 << 9] == plain


@pytest.mark.parametrize("odd", [1, 2, 4, 7])
def test_an_update_is_aligned(tables, odd):
    """An address inside an entry is refused."""
    assert tables.mmu_update((tables.frames[0] << 12) + odd, 0) == REFUSED


def test_what_was_present_and_changed_is_unflushed(tables):
    """Only a change of a present entry leaves the TLB with what is not so any more, and every such
    change does."""
    l1, page = tables.frames[:2]
    assert tables.pin(l1, PGT_L1) == 0
    assert tables.update_entry(l1, 0, page << 12 | FULL) == 0
    assert not tables.unflushed
    assert tables.update_entry(l1, 0, page << 12 | READ_ONLY) == 0
    assert tables.unflushed
    tables.unflushed = False
    assert tables.update_entry(l1, 0, page << 12 | FULL | PTE_PCD) == REFUSED
    assert not tables.unflushed
    assert tables.unpin(l1) == 0
    assert tables.unflushed


@pytest.mark.parametrize("kind", [PGT_L1, PGT_L2, PGT_L4, PGT_SEG_DESC])
@pytest.mark.parametrize("unflushed", [False, True])
def test_nothing_unflushed_outlives_a_new_table(tables, kind, unflushed):
    """A frame that becomes a table or a page of descriptors asks for a flush if a mapping changed
    since the last one, which may have been a writable one of that frame; so does an L1 that comes
    with the L2 that names it. A frame that becomes writable asks for none."""
    tables.unflushed = unflushed
    assert tables.get_type(tables.frames[0], PGT_WRITABLE) == 0
    assert not tables.stale_tlb
    if kind == PGT_L2:
        l2, l1 = tables.frames[1:3]
        tables.machine.mem[l2, 0] = l1 << 12 | FULL
        assert len(tables._hold_l1s([l1 << 12 | FULL])) == 1
    else:
        assert tables.get_type(tables.frames[1], kind) == 0
    assert tables.stale_tlb == unflushed


def test_many_pages_to_flush_are_all(tables):
    """So many single flushes in one hypercall become one of everything."""
    for i in range(100):
        tables.flush_page(i << 12)
    assert tables.stale_tlb
    assert len(tables.stale_pages) < 100


@pytest.mark.parametrize(
    ("descriptor", "rc", "stored"),
    [
        (0, 0, 0),
        (CODE, 0, CODE),
        (CODE & ~(3 << 45), 0, CODE),  # DPL 0 is lifted
        (CODE & ~(1 << 44), REFUSED, CODE & ~(1 << 44)),  # a system descriptor
        (0x0000_8E00_0000_0000, REFUSED, 0x0000_8E00_0000_0000),  # an interrupt gate
        (CODE & ~(1 << 47 | 1 << 44), 0, CODE & ~(1 << 47 | 1 << 44)),  # not present
    ],
)
def test_descriptor_pages_hold_no_gates(tables, descriptor, rc, stored):
    """A page of descriptors has code and data only, none of ring 0."""
    mfn = tables.frames[0]
    tables.q[(mfn << 9) + 77] = descriptor
    assert tables.get_type(mfn, PGT_SEG_DESC) == rc
    assert tables.q[(mfn << 9) + 77] == stored
    assert tables.count[mfn] == (rc == 0)


# -- the software walk ---


@pytest.fixture
def tree(tables):
    """An L4 that maps frames[4] twice from `base` on: page 9 writable, page 10 read-only."""
    l4, l3, l2, l1, page = tables.frames[:5]
    for table, slot, target in ((l4, 3, l3), (l3, 5, l2), (l2, 7, l1)):
        write(tables, table, slot, target)
    write(tables, l1, 9, page)
    write(tables, l1, 10, page, READ_ONLY)
    assert tables.pin(l4, PGT_L4) == 0
    tables.base = 3 << 39 | 5 << 30 | 7 << 21
    return tables


def test_the_walk_finds_what_is_mapped(tree):
    """walk() gives the machine address behind a virtual one, to write only where all levels
    allow it, and nothing where anything is missing."""
    l4, page, base = tree.frames[0], tree.frames[4], tree.base
    assert tree.walk(l4, base + (9 << 12) + 0x123) == (page << 12) + 0x123
    assert tree.walk(l4, base + (9 << 12), write=True) == page << 12
    assert tree.walk(l4, base + (10 << 12) + 8) == (page << 12) + 8
    assert tree.walk(l4, base + (10 << 12), write=True) == -1
    for gone in (11 << 12, 1 << 21, 1 << 30, 1 << 39, 1 << 47, 1 << 63):
        assert tree.walk(l4, base + (9 << 12) ^ gone) == -1
    for level, slot in ((0, 3), (1, 5), (2, 7), (3, 9)):
        table = tree.frames[level]
        index = (table << 9) + slot
        for missing in (PTE_USER, PTE_RW, PTE_PRESENT):
            tree.q[index] &= ~missing
            wanted = -1 if missing != PTE_RW else page << 12
            assert tree.walk(l4, base + (9 << 12)) == wanted
            assert tree.walk(l4, base + (9 << 12), write=True) == -1
            tree.q[index] |= missing


def test_the_walk_follows_xens_superpages(tree):
    """The m2p, mapped by Xen with 2 MiB pages, can be read through slot 256, never written;
    slot 257 (GDTs) is Xen's alone."""
    l4, machine = tree.frames[0], tree.machine
    m2p = 0xFFFF_8000_0000_0000
    mfn = tree.frames[4]
    machine.m2p[mfn] = 0x55
    at = tree.walk(l4, m2p + 8 * mfn)
    assert machine.map[at : at + 8] == (0x55).to_bytes(8, "little")
    assert tree.walk(l4, m2p + 8 * mfn, write=True) == -1
    assert tree.walk(l4, 0xFFFF_8080_0000_0000) == -1


def test_the_l1_slot_of_an_address(tree):
    """l1_slot() finds where an address's entry is, mapped or not, but never one of Xen's."""
    l4, l1, base = tree.frames[0], tree.frames[3], tree.base
    for slot in (0, 9, 511):
        assert tree.l1_slot(l4, base + (slot << 12) + 5) == (l1 << 12) + 8 * slot
    for gone in (1 << 21, 1 << 30, 1 << 39, 1 << 47, 1 << 63):
        assert tree.l1_slot(l4, base ^ gone) == -1
    for xen in (256, 257, 271):
        assert tree.l1_slot(l4, 0xFFFF << 48 | xen << 39) == -1


@pytest.mark.parametrize("wrong", ["nothing", "another's", "flags", "beyond"])
def test_many_tables_in_use_at_once(guest, wrong):
    """Entries that name tables in use are taken together; of one that is wrong among them nothing
    is left, and what is right is given back to the last reference."""
    tables, machine = guest.tables, guest.machine
    other = Guest(machine, domid=2)
    (l2,) = guest.unmap(9)
    good = guest.l1 << PAGE_SHIFT | FULL & ~PTE_USER
    bad = {
        "nothing": good,
        "another's": other.l1 << PAGE_SHIFT | FULL,
        "flags": good | PTE_PWT,
        "beyond": tables.nr_frames << PAGE_SHIFT | FULL,
    }[wrong]
    machine.mem[l2, 10:22] = good
    machine.mem[l2, 15] = bad
    before = machine.type_count.copy(), machine.refs.copy()
    rc = tables.pin(l2, PGT_L2)
    assert rc == (0 if wrong == "nothing" else -errno.EINVAL)
    if rc == 0:
        assert tables.count[guest.l1] == before[0][guest.l1] + 12
        assert machine.refs[guest.l1] == before[1][guest.l1] + 12
        assert (machine.mem[l2, 10:22] == good | PTE_USER).all()
        assert tables.unpin(l2) == 0
    assert (machine.type_count == before[0]).all()
    assert (machine.refs == before[1]).all()
