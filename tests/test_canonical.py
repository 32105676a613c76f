"""Canonicalise and localise: page tables and p2m pages without a frame of the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from xsave.canonical import (
    canonical_p2m,
    canonicalise,
    local_p2m,
    localise,
    localise_entries,
    mfns_to_pfns,
    present_entries,
)
from xsave.frames import INVALID_M2P_ENTRY, INVALID_P2M_ENTRY, PTE_PRESENT, PTE_PSE

M64 = (1 << 64) - 1
FRAME = 0x000F_FFFF_FFFF_F000
XEN_SLOTS = range(256, 272)
#: Frames of the machine that are not the guest's: the m2p says anything of them.
NR_FRAMES = 300


def without(*bits):
    """All bits but these."""
    return np.uint64(M64 & ~sum(bits))


@dataclass
class World:
    """A guest of some pfns on a machine: p2m (holes are invalid), m2p, and frames of others'."""

    p2m: np.ndarray
    m2p: np.ndarray
    others: np.ndarray


def make_world(rng, nr_pfns, hole_share=0.2):
    """Shuffled frames; an m2p that is right for the guest's frames and a trap for all others."""
    mfns = rng.permutation(NR_FRAMES).astype(np.uint64)
    p2m = mfns[:nr_pfns].copy()
    m2p = np.full(NR_FRAMES, INVALID_M2P_ENTRY, np.uint64)
    m2p[p2m] = np.arange(nr_pfns, dtype=np.uint64)
    p2m[rng.random(nr_pfns) < hole_share] = INVALID_P2M_ENTRY
    others = mfns[nr_pfns:]
    # Another guest's frames have pfns of that guest's, which this one has too.
    m2p[others[::2]] = rng.integers(0, nr_pfns, others[::2].size)
    return World(p2m, m2p, others)


def make_tables(rng, world, levels, *, bad_share=0.0):
    """Tables of these levels: present entries of own frames, absent ones with any bits, and in an
    L4 anything at all in Xen's slots; bad_share of the present entries will not do."""
    n = len(levels)
    flags = rng.integers(0, 1 << 12, (n, 512), np.uint64) & without(PTE_PSE)
    flags |= rng.integers(0, 1 << 12, (n, 512), np.uint64) << np.uint64(52)
    frames = rng.choice(world.p2m[world.p2m != INVALID_P2M_ENTRY], (n, 512))
    tables = flags & without(PTE_PRESENT) | frames << np.uint64(12)
    present = rng.random((n, 512)) < 0.5
    tables[present] |= np.uint64(PTE_PRESENT)
    bad = present & (rng.random((n, 512)) < bad_share)
    wrong = np.concatenate((world.others, [NR_FRAMES, NR_FRAMES + 7, (1 << 40) - 1]))
    wrong = rng.choice(wrong.astype(np.uint64), (n, 512)) << np.uint64(12)
    tables[bad] = tables[bad] & without(FRAME) | wrong[bad]
    absent = ~present
    tables[absent] = rng.integers(0, M64, (n, 512), np.uint64, endpoint=True)[absent]
    tables[absent] &= without(PTE_PRESENT)
    pse = present & (rng.random((n, 512)) < bad_share)
    tables[pse] |= np.uint64(PTE_PSE)
    rows = np.flatnonzero(np.array(levels) == 4)
    tables[rows, 256:272] = rng.integers(0, M64, (rows.size, 16), np.uint64, endpoint=True)
    return tables


def slow_canonicalise(tables, levels, world):
    """Entry by entry: (tables, bad entries)."""
    known = {int(m): pfn for pfn, m in enumerate(world.p2m) if m != INVALID_P2M_ENTRY}
    out, bad = [], set()
    for row, (table, level) in enumerate(zip(tables.tolist(), levels, strict=True)):
        out.append([])
        for slot, entry in enumerate(table):
            if level == 4 and slot in XEN_SLOTS:
                entry = 0
            elif entry & PTE_PRESENT:
                mfn = (entry & FRAME) >> 12
                if mfn not in known or (level > 1 and entry & PTE_PSE):
                    bad.add((row, slot))
                else:
                    entry = entry & ~FRAME | known[mfn] << 12
            out[-1].append(entry)
    return np.array(out, np.uint64), bad


worlds = st.tuples(st.integers(0, 1 << 32), st.integers(1, 120))
levels_of = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=50)
@given(worlds, levels_of, st.sampled_from([0.0, 0.01, 0.3]))
def test_canonicalise_is_what_it_does_to_each_entry(world, levels, bad_share):
    """Present entries get pfns, Xen's slots of an L4 are zeroed, all else is untouched; entries of
    foreign frames and superpages are reported, each once, with their tables; the input stays."""
    seed, nr_pfns = world
    rng = np.random.default_rng(seed)
    world = make_world(rng, nr_pfns, hole_share=0.2 if nr_pfns > 20 else 0)
    tables = make_tables(rng, world, levels, bad_share=bad_share)
    before = tables.copy()
    result = canonicalise(tables, np.array(levels), world.m2p, world.p2m)
    expected, bad = slow_canonicalise(tables, levels, world)
    assert (result.tables == expected).all()
    assert {(int(r), int(s)) for r, s in result.bad} == bad
    assert len(result.bad) == len(bad)
    assert np.flatnonzero(result.deferred).tolist() == sorted({row for row, _ in bad})
    assert (tables == before).all()


@settings(max_examples=50)
@given(worlds, levels_of, st.integers(0, 1 << 32))
def test_tables_come_back_under_any_other_frames(world, levels, elsewhere):
    """localise undoes canonicalise, but for Xen's slots; on a host with other frames the tables
    are canonically the same, and name the same pfns."""
    seed, nr_pfns = world
    rng = np.random.default_rng(seed)
    here = make_world(rng, nr_pfns, hole_share=0)
    tables = make_tables(rng, here, levels)
    rows = np.flatnonzero(np.array(levels) == 4)
    canonical = canonicalise(tables, np.array(levels), here.m2p, here.p2m)
    assert not canonical.deferred.any()
    tables[rows, 256:272] = 0
    assert (localise(canonical.tables, here.p2m) == tables).all()
    there = make_world(np.random.default_rng(elsewhere), nr_pfns, hole_share=0)
    moved = localise(canonical.tables, there.p2m)
    again = canonicalise(moved, np.array(levels), there.m2p, there.p2m)
    assert (again.tables == canonical.tables).all()
    assert not again.bad.size


@settings(max_examples=30)
@given(worlds, levels_of)
def test_no_frame_of_the_host_is_left(world, levels):
    """Every present entry of a canonical table names a pfn of the guest's; where machine frames
    and pfns are disjoint, none of the former remains."""
    seed, nr_pfns = world
    rng = np.random.default_rng(seed)
    world = make_world(rng, nr_pfns, hole_share=0)
    offset = np.uint64(1 << 20)
    p2m = world.p2m + offset
    m2p = np.full(NR_FRAMES + int(offset), INVALID_M2P_ENTRY, np.uint64)
    m2p[p2m] = np.arange(nr_pfns, dtype=np.uint64)
    tables = make_tables(rng, World(p2m, m2p, world.others + offset), levels)
    canonical = canonicalise(tables, np.array(levels), m2p, p2m).tables
    _, pfns = present_entries(canonical)
    assert (pfns < nr_pfns).all()
    present = canonical[canonical & np.uint64(PTE_PRESENT) != 0]
    assert (((present & np.uint64(FRAME)) >> np.uint64(12)) < offset).all()


def test_present_entries_and_their_pfns():
    """Where they are and what they name, in order."""
    tables = np.zeros((2, 512), np.uint64)
    tables[0, 5] = 7 << 12 | 1
    tables[1, 0] = 9 << 12 | 1 | 1 << 63
    tables[1, 1] = 9 << 12
    at, pfns = present_entries(tables)
    assert (at.tolist(), pfns.tolist()) == ([5, 512], [7, 9])


@settings(max_examples=30)
@given(worlds, levels_of)
def test_localised_in_place_or_anew_is_the_same(world, levels):
    seed, nr_pfns = world
    rng = np.random.default_rng(seed)
    world = make_world(rng, nr_pfns, hole_share=0)
    canonical = canonicalise(
        make_tables(rng, world, levels), np.array(levels), world.m2p, world.p2m
    ).tables
    at, pfns = present_entries(canonical)
    inside = pfns < nr_pfns
    canonical.reshape(-1)[at[~inside]] = 0
    anew = localise(canonical, world.p2m)
    localise_entries(canonical, at[inside], pfns[inside], world.p2m)
    assert np.array_equal(canonical, anew)


@given(
    hnp.arrays(np.uint64, st.integers(0, 20), elements=st.integers(0, 12) | st.integers(0, M64)),
    hnp.arrays(np.uint64, 10, elements=st.integers(0, 8) | st.integers(0, M64)),
    hnp.arrays(np.uint64, 6, elements=st.integers(0, 12) | st.integers(0, M64)),
)
def test_a_frame_is_the_guests_if_both_tables_say_so(mfns, m2p, p2m):
    """Whatever the guest wrote into p2m and m2p: a frame has the pfn that the m2p says if that
    pfn's entry in the p2m is the frame, else it has none."""
    pfns, valid = mfns_to_pfns(mfns, m2p, p2m)
    for mfn, pfn, good in zip(mfns.tolist(), pfns.tolist(), valid.tolist(), strict=True):
        claimed = int(m2p[mfn]) if mfn < 10 else None
        expected = claimed is not None and claimed < 6 and int(p2m[claimed]) == mfn
        assert good == expected
        if good:
            assert pfn == claimed


def test_any_shape_of_frames():
    """mfns_to_pfns keeps the shape of what it is given."""
    p2m = np.array([3, 1], np.uint64)
    m2p = np.array([9, 1, 9, 0], np.uint64)
    pfns, valid = mfns_to_pfns(np.array([[3, 1], [0, 2]], np.uint64), m2p, p2m)
    assert valid.tolist() == [[True, True], [False, False]]
    assert pfns[0].tolist() == [0, 1]


# -- p2m pages ---


@st.composite
def p2ms(draw):
    """A p2m around the size of a page or two, with holes."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    p2m = rng.integers(0, 1 << 30, draw(st.sampled_from([1, 511, 512, 513, 1024, 1500])), np.uint64)
    p2m[rng.random(p2m.size) < 0.3] = INVALID_P2M_ENTRY
    return p2m


@settings(max_examples=20)
@given(p2ms())
def test_p2m_pages_hold_the_identity(p2m):
    """In an image entry i of the p2m is i where there is memory and invalid where there is none,
    in whole pages whose rest is invalid."""
    pages = canonical_p2m(p2m)
    assert pages.shape == (-(-p2m.size // 512), 512)
    for pfn, entry in enumerate(pages.reshape(-1).tolist()):
        there = pfn < p2m.size and p2m[pfn] != INVALID_P2M_ENTRY
        assert entry == (pfn if there else INVALID_P2M_ENTRY)


@settings(max_examples=20)
@given(p2ms())
def test_p2m_pages_after_a_restore(p2m):
    """A restored guest finds its new frames there, holes and the rest of the last page invalid."""
    pages = local_p2m(p2m)
    assert pages.shape == (-(-p2m.size // 512), 512)
    assert (pages.reshape(-1)[: p2m.size] == p2m).all()
    assert (pages.reshape(-1)[p2m.size :] == INVALID_P2M_ENTRY).all()


@pytest.mark.parametrize("convert", [canonical_p2m, local_p2m])
def test_p2m_pages_of_other_sizes(convert):
    """The entries of a page may be fewer (an image of a 32-bit guest has 1024)."""
    assert convert(np.arange(10, dtype=np.uint64), 4).shape == (3, 4)
