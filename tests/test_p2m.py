"""Finding a guest's p2m: by the tree, by the linear list, or in the image it came from."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from tests.guest.rig import FULL, MIB, Machines
from xsave import p2m as guest_p2m
from xsave.errors import GuestStateError
from xsave.frames import INVALID_P2M_ENTRY, PTE_PRESENT
from xsave.guest.xen.domctl import DomainState, Domctl
from xsave.public import SharedInfo

INVALID = np.uint64(INVALID_P2M_ENTRY)
DOMID = 1
VADDR = 0xFFFF_C900_0000_0000
FOREIGN_FRAME = 1 << 63 | 5  # as Linux marks entries that are not its memory
IDENTITY_FRAME = 1 << 62 | 0xA0


class World:
    """A guest of `size` pfns that published its p2m both ways; the lists lie in its last pages."""

    def __init__(self, machine, size=1500):
        self.machine = machine
        self.mfns = machine.allocate(DOMID, size)
        machine.m2p[self.mfns] = np.arange(size, dtype=np.uint64)
        self.size = size
        self.nr_leaves = -(-size // 512)
        #: pfns, from the end: leaves, the list of leaves, the list of lists, then four tables.
        self.leaves = np.arange(size - self.nr_leaves, size)
        self.lists, self.top, *self.tables = range(size - self.nr_leaves - 6, size - self.nr_leaves)
        self.content = np.full(self.nr_leaves * 512, INVALID)
        self.content[:size] = self.mfns
        self.shared = SharedInfo()
        self.shared.arch.max_pfn = size
        self.write_leaves()
        self.publish_tree()
        self.publish_list()

    def page(self, pfn):
        return self.machine.mem[self.mfns[pfn]]

    def write_leaves(self):
        self.machine.mem[self.mfns[self.leaves]] = self.content.reshape(-1, 512)

    def publish_tree(self):
        self.page(self.top)[0] = self.mfns[self.lists]
        self.page(self.lists)[: self.nr_leaves] = self.mfns[self.leaves]
        self.shared.arch.pfn_to_mfn_frame_list_list = self.mfns[self.top]

    def publish_list(self):
        pages = VADDR >> 12
        l4, l3, l2, l1 = self.tables
        for pfn, shift, target in ((l4, 27, l3), (l3, 18, l2), (l2, 9, l1)):
            self.page(pfn)[pages >> shift & 511] = int(self.mfns[target]) << 12 | FULL
        first = pages & 511
        entries = self.mfns[self.leaves] << np.uint64(12) | np.uint64(FULL)
        self.page(l1)[first : first + self.nr_leaves] = entries
        self.shared.arch.p2m_cr3 = int(self.mfns[l4]) << 12
        self.shared.arch.p2m_vaddr = VADDR

    def find(self, **state):
        domctl = Domctl(self.machine, DOMID, "guest", None)
        return guest_p2m.find(domctl, make_state(**state), self.shared)

    def refused(self):
        with pytest.raises(GuestStateError) as caught:
            self.find()
        return str(caught.value)


def make_state(*, never_run=False, p2m_frames=None, p2m_size=0):
    common = {"nr_vcpus": 1, "max_pages": 0, "shared_info_mfn": 0, "tsc": (0, 0, 0, 0)}
    common |= {"config": b"", "cpuid_policy": b"", "msr_policy": b"", "xen_version": (4, 17)}
    return DomainState(never_run=never_run, p2m_frames=p2m_frames, p2m_size=p2m_size, **common)


@pytest.fixture
def machine():
    machines = Machines()
    yield machines.make(16 * MIB)
    machines.close()


@pytest.fixture
def world(machine):
    return World(machine)


def only_tree(world):
    world.shared.arch.p2m_cr3 = world.shared.arch.p2m_vaddr = 0


def only_list(world):
    world.shared.arch.pfn_to_mfn_frame_list_list = 0


ONE_WAY = pytest.mark.parametrize("keep", [only_tree, only_list, lambda world: None])


@ONE_WAY
def test_the_p2m_is_found(world, keep):
    """By the tree alone, by the list alone, or with both: the frames of all pfns, the pfns of the
    p2m's own pages in order, and those of the tree's lists if there is a tree."""
    keep(world)
    found = world.find()
    assert (found.p2m == world.mfns).all()
    assert found.frames.tolist() == world.leaves.tolist()
    lists = [] if keep is only_list else [world.lists, world.top]
    assert sorted(found.list_frames.tolist()) == sorted(lists)


@pytest.mark.parametrize("size", [20, 511, 512, 513, 1024, 2000])
@ONE_WAY
def test_any_size(machine, size, keep):
    """Sizes around whole pages: neither a page too few nor one too many is looked at."""
    world = World(machine, size)
    keep(world)
    found = world.find()
    assert found.p2m.size == size
    assert (found.p2m == world.mfns).all()
    assert found.frames.size == -(-size // 512)


@ONE_WAY
def test_entries_that_are_no_memory_are_holes(world, keep):
    """Entries of frames the guest has not got, that Linux marked, or that the m2p does not know
    under this pfn, are holes; all others stay."""
    keep(world)
    foreign = int(world.machine.allocate(2, 1)[0])
    world.machine.m2p[foreign] = 3
    odd = {
        0: INVALID_P2M_ENTRY,
        3: foreign,
        4: FOREIGN_FRAME,
        5: IDENTITY_FRAME,
        6: world.machine.nr_frames,
        7: int(world.mfns[8]),  # a frame of another pfn
        9: 1,
    }
    for pfn, entry in odd.items():
        world.content[pfn] = entry
    world.machine.m2p[world.mfns[10]] = 11  # the m2p disagrees
    world.write_leaves()
    found = world.find()
    expected = world.mfns.copy()
    expected[[*odd, 10]] = INVALID
    assert (found.p2m == expected).all()
    assert found.frames.tolist() == world.leaves.tolist()


def test_the_list_may_cross_tables(world):
    """A list that begins in the last entries of one L1 goes on in the next."""
    only_list(world)
    *_, l2, l1 = world.tables
    spare = 40
    vaddr = VADDR + (510 << 12)
    first = vaddr >> 12 & 511
    entries = world.mfns[world.leaves] << np.uint64(12) | np.uint64(FULL)
    world.page(l1)[:] = world.page(spare)[:] = 0
    world.page(l1)[first:] = entries[:2]
    world.page(spare)[0] = entries[2]
    world.page(l2)[(VADDR >> 21 & 511) + 1] = int(world.mfns[spare]) << 12 | FULL
    world.shared.arch.p2m_vaddr = vaddr
    assert (world.find().p2m == world.mfns).all()


def test_pages_may_be_shared(world):
    """Linux puts one page of invalid entries wherever nothing is: it is found as often."""
    world.content[: 2 * 512] = INVALID
    world.write_leaves()
    world.page(world.lists)[0] = world.page(world.lists)[1]
    only_tree(world)
    found = world.find()
    assert found.frames.tolist() == [world.leaves[1], world.leaves[1], world.leaves[2]]
    assert (found.p2m[:1024] == INVALID).all()
    assert (found.p2m[1024:] == world.mfns[1024:]).all()


# -- a domain that never ran ---


def test_a_restored_domain_has_the_p2m_of_its_image(world):
    """A domain that never ran published nothing: its p2m is the m2p turned round, its pages are
    those the image named; frames without a pfn are not in it."""
    world.shared = SharedInfo()
    frames = np.array([3, 4, 5], np.uint64)
    world.machine.allocate(DOMID, 7)  # Xen's own of this domain: no pfn
    world.machine.m2p[world.mfns[20]] = INVALID
    found = world.find(never_run=True, p2m_frames=frames, p2m_size=world.size + 30)
    expected = np.full(world.size + 30, INVALID)
    expected[: world.size] = world.mfns
    expected[20] = INVALID
    assert (found.p2m == expected).all()
    assert found.frames.tolist() == [3, 4, 5]
    assert found.list_frames.size == 0


def test_a_domain_that_ran_publishes_anew(world):
    """Once it ran, the image's list counts no more; nor does it for a built domain."""
    frames = np.array([3, 4, 5], np.uint64)
    for state in ({"p2m_frames": frames, "p2m_size": 5}, {"never_run": True}):
        assert (world.find(**state).p2m == world.mfns).all()


# -- guests that published nonsense ---


@pytest.mark.parametrize("size", [0, 1 << 32, (1 << 64) - 1, 1 << 28])
def test_an_impossible_size(world, size):
    """A p2m of no pfn, or of absurdly many, is refused by its size."""
    world.shared.arch.max_pfn = size
    assert f"{size} pfns" in world.refused()


def test_nothing_published(world):
    """A guest with neither tree nor list, or with Xen's "none" in place of a tree."""
    only_tree(world)
    for nothing in (0, INVALID_P2M_ENTRY):
        world.shared.arch.pfn_to_mfn_frame_list_list = nothing
        assert "published no p2m" in world.refused()


@pytest.mark.parametrize("frame", ["foreign", "Xen's", "none", "far"])
@pytest.mark.parametrize("where", ["top", "list", "leaf", "cr3", "table", "list page"])
def test_a_frame_that_is_not_the_guests(world, frame, where):
    """Any step of either way that leads to a frame of another's is refused with that frame's
    number, and nothing of it is read."""
    mfn = {
        "foreign": int(world.machine.allocate(2, 1)[0]),
        "Xen's": 1,
        "none": world.machine.nr_frames,
        "far": (1 << 40) - 1,
    }[frame]
    only_tree(world) if where in ("top", "list", "leaf") else only_list(world)
    _, l3, _, l1 = world.tables
    if where == "top":
        world.shared.arch.pfn_to_mfn_frame_list_list = mfn
    elif where == "list":
        world.page(world.top)[0] = mfn
    elif where == "leaf":
        world.page(world.lists)[1] = mfn
    elif where == "cr3":
        world.shared.arch.p2m_cr3 = mfn << 12
    else:
        table, shift = (l3, 30) if where == "table" else (l1, 12)
        world.page(table)[VADDR >> shift & 511] = mfn << 12 | FULL
    assert f"{mfn:#x}" in world.refused()


@pytest.mark.parametrize("level", range(4))
def test_a_list_that_is_not_mapped(world, level):
    """A hole in the page tables under the list, at any level."""
    only_list(world)
    shift = (39, 30, 21, 12)[level]
    entry = VADDR >> shift & 511
    world.page(world.tables[level])[entry] &= np.uint64(~PTE_PRESENT & (1 << 64) - 1)
    assert "not mapped" in world.refused()


@ONE_WAY
def test_a_p2m_in_frames_without_a_pfn(world, keep):
    """A p2m page whose frame is the guest's, but has no pfn, cannot be put into an image."""
    keep(world)
    world.content[world.leaves[1]] = INVALID_P2M_ENTRY
    world.write_leaves()
    assert "no pfn" in world.refused()


@pytest.mark.parametrize("vaddr", [0, 1, (1 << 64) - 1, 0x7FFF_FFFF_F000, VADDR + 8])
def test_any_address_of_the_list(world, vaddr):
    """Whatever the guest says where its list is, it is found there or refused."""
    only_list(world)
    world.shared.arch.p2m_vaddr = vaddr
    if vaddr == VADDR + 8:
        assert (world.find().p2m == world.mfns).all()
    else:
        assert "not mapped" in world.refused()


def test_random_shared_info(world):
    """Random bytes in shared_info's arch part are a p2m or a GuestStateError."""
    rng = np.random.default_rng(1)
    pool = [0, 1, world.size, 1 << 20, VADDR, int(world.mfns[3]), int(world.mfns[3]) << 12]
    for _ in range(200):
        values = [int(rng.choice(np.array(pool, np.uint64))) for _ in range(6)]
        at = SharedInfo.arch.offset
        raw = bytearray(bytes(world.shared))
        raw[at : at + 48] = struct.pack("<6Q", *values)
        world.shared = SharedInfo.from_buffer(raw)
        try:
            found = world.find()
        except GuestStateError:
            continue
        assert found.p2m.size == values[0]


# -- large and holey p2ms ---


def test_the_empty_tail_of_a_tree_is_left_off(world):
    """A tree that ends in the same list page again and again covers holes there: the p2m found
    ends with the first of them (libxc does the same)."""
    only_tree(world)
    missing, empty = 3, 4
    world.content[[missing, empty]] = world.mfns[[missing, empty]]
    world.page(missing)[:] = INVALID
    world.page(empty)[:] = world.mfns[missing]
    top = world.page(world.top)
    world.page(world.lists)[world.nr_leaves :] = world.mfns[missing]
    top[1:5] = world.mfns[empty]
    world.shared.arch.max_pfn = 5 << 18
    found = world.find()
    assert found.p2m.size == 2 << 18
    assert (found.p2m[: world.size] == world.mfns).all()
    assert (found.p2m[world.size :] == INVALID).all()
    assert found.frames[world.nr_leaves :].tolist() == [missing] * (1024 - world.nr_leaves)
    assert sorted(found.list_frames.tolist()) == sorted([empty, world.lists, world.top])


@ONE_WAY
def test_a_p2m_too_large_for_the_host(world, keep):
    """Whatever is published, there is a limit to how much of it is looked at."""
    keep(world)
    world.page(world.top)[:17] = world.mfns[10:27]
    world.shared.arch.max_pfn = guest_p2m.largest(world.machine.nr_frames) + 1
    assert "too large for this host" in world.refused()


def test_how_large_a_p2m_may_be():
    """Four times the host's frames, or 16 GiB of address space on a small host."""
    assert guest_p2m.largest(1 << 22) == 1 << 24
    assert guest_p2m.largest(4096) == 1 << 22
