"""A domain's own frames, rings and descriptor tables."""

from __future__ import annotations

import errno
import struct

import numpy as np
import pytest

from tests.guest.pagetable_model import CODE
from tests.guest.rig import FULL, MIB, Guest, make_domain
from xsave.errors import HostCannotTake
from xsave.guest.xen.domain import PERDOMAIN_VA, RESERVED_GDT_PAGE
from xsave.guest.xen.hypercalls import memory
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.machine import DOMID_FREE
from xsave.guest.xen.pagetypes import PGT_L1, PGT_SEG_DESC, PGT_WRITABLE, PGT_XEN
from xsave.public import SHUTDOWN_CRASH

CONSOLE, STORE = 5, 6


def words(*values):
    return struct.pack(f"<{len(values)}I", *values)


@pytest.fixture
def ringed(guest):
    """A guest whose console and xenstore rings are its pages 5 and 6."""
    guest.domain.connect_console(guest.frames[CONSOLE])
    guest.domain.connect_store(guest.frames[STORE])
    return guest


def test_a_new_domain_owns_its_frames_only(machine):
    """A domain begins with no page of its guest's; what Xen has of it the guest cannot name, but
    for shared_info; upcalls and all events are masked."""
    domain = make_domain(machine, 7)
    own = np.flatnonzero(machine.owner == 7)
    assert domain.nr_pages() == 0
    assert [mfn for mfn in own if domain.owns(int(mfn))] == [domain.shared_info_mfn]
    assert np.count_nonzero(machine.page_type[own] == PGT_XEN) == own.size - 1
    assert all(info.evtchn_upcall_mask == 1 for info in domain.shared.vcpu_info)
    assert list(domain.shared.evtchn_mask) == [(1 << 64) - 1] * 64
    machine.allocate(7, 33)
    assert domain.nr_pages() == 33


def test_two_domains_share_no_frame(machine):
    """Two domains on one machine each have their own frames, and free only those."""
    one, two = Guest(machine, domid=1), Guest(machine, domid=2)
    assert not set(one.frames) & set(two.frames)
    assert not any(one.domain.owns(mfn) for mfn in two.frames)
    two.poke(3, 0, b"still here")
    machine.free_domain(1)
    assert two.peek(3, 0, 10) == b"still here"
    assert machine.owner[one.frames[0]] == DOMID_FREE


def test_frames_xen_writes_to_become_no_tables(ringed):
    """shared_info and both rings are never page tables or descriptors, even once the guest has
    no mapping of them and has filled them with valid entries; nor can they be given back."""
    tables, machine = ringed.tables, ringed.machine
    for mfn in (ringed.frames[CONSOLE], ringed.frames[STORE], ringed.domain.shared_info_mfn):
        for slot in (CONSOLE, STORE):
            tables.update_entry(ringed.l1, slot, 0)
        machine.mem[mfn] = 0
        for kind in (PGT_L1, 2, 3, 4, PGT_SEG_DESC):
            assert tables.get_type(mfn, kind) == -errno.EINVAL
        assert memory._decrease(ringed.hv, [mfn]) == 0
        assert machine.owner[mfn] == 1


def test_a_ring_must_be_an_ordinary_page(guest):
    """A page table, another domain's frame or none can be no ring."""
    foreign = int(guest.machine.allocate(2, 1)[0])
    for mfn in (guest.l1, guest.l4, foreign, 1, guest.domain.scratch_mfn, 1 << 50):
        for connect in (guest.domain.connect_console, guest.domain.connect_store):
            with pytest.raises(HostCannotTake):
                connect(mfn)
    assert not guest.domain.events.ports


def test_the_console_ring_is_served(ringed):
    """What the guest wrote goes to the log and the guest is notified; what was typed comes to it,
    as far as there is room."""
    domain, log = ringed.domain, ringed.machine.directory / "console-1.log"
    domain.shared.evtchn_mask[0] = 0
    ringed.poke(CONSOLE, 1024, b"hello")
    ringed.poke(CONSOLE, 3072 + 12, words(5))
    assert domain.events.send(domain.console_port) == 0
    assert log.read_bytes() == b"hello"
    assert domain.events.is_pending(domain.console_port)
    assert ringed.peek(CONSOLE, 3072 + 8, 4) == words(5)
    domain.console.type(b"x" * 1500)
    domain.serve_console()
    assert ringed.peek(CONSOLE, 0, 1024) == b"x" * 1024
    assert ringed.peek(CONSOLE, 3076, 4) == words(1024)
    ringed.poke(CONSOLE, 3072, words(1024))
    domain.serve_console()
    assert ringed.peek(CONSOLE, 3076, 4) == words(1500)


def test_who_types_too_much_is_told(ringed):
    """64 KiB wait for a guest that does not read, all of what was typed is there in the end, and
    who was told to wait is called once when there is room."""
    console, called = ringed.domain.console, []
    console.on_room = lambda: called.append(1)
    assert console.type(b"a" * 65535)
    assert not console.type(b"b" * 1025)
    console.drain()  # the ring takes 1024
    assert not called
    page, at = ringed.domain.console.page, 3072
    read = 0
    while console._input:
        page[at : at + 4] = page[at + 4 : at + 8]  # the guest has read all
        console.drain()
        read += 1
    assert called == [1]
    assert read == 64
    assert console.type(b"c")


@pytest.mark.parametrize("cons", [0, 2047, 0xFFFFFFF0])
def test_the_console_ring_wraps(ringed, cons):
    """Indices run freely modulo 2^32; the text is that of the ring, in order."""
    text = bytes(range(1, 41))
    for i, byte in enumerate(text):
        ringed.poke(CONSOLE, 1024 + (cons + i) % 2048, bytes([byte]))
    ringed.poke(CONSOLE, 3072 + 8, words(cons, cons + 40 & 0xFFFFFFFF))
    ringed.poke(CONSOLE, 3072, words(cons, cons))
    ringed.domain.console.type(text)
    ringed.domain.serve_console()
    assert (ringed.machine.directory / "console-1.log").read_bytes() == text
    ring = ringed.peek(CONSOLE, 0, 1024) * 2
    assert ring[cons % 1024 :][:40] == text


@pytest.mark.parametrize(
    "indices", [(0, 1025, 0, 2049), (0, 2000, 7, 6), (5, 0, 0, 4096), (0, 1 << 31, 1, 0)]
)
def test_a_console_ring_full_of_lies(ringed, indices):
    """Indices farther apart than the ring is long take and give nothing, and touch only the
    ring's page."""
    others = [mfn for mfn in ringed.frames if mfn != ringed.frames[CONSOLE]]
    before = ringed.machine.pages[others].tobytes()
    ringed.poke(CONSOLE, 3072, words(*indices))
    ringed.domain.console.type(b"typed" * 1000)
    ringed.domain.serve_console()
    assert ringed.peek(CONSOLE, 0, 1024) == bytes(1024)
    assert ringed.peek(CONSOLE, 3076, 4) == words(indices[1])
    log = (ringed.machine.directory / "console-1.log").read_bytes()
    assert log == b""
    assert ringed.machine.pages[others].tobytes() == before


def test_all_frames_follow_from_the_order(machines):
    """Xen's, those that fill it, those of its grant table and those that it asks for: a domain
    with an order gets the same on hosts with different seeds and pasts, so that no number of a
    frame that its kernel ever sees is another."""

    def frames_of(machine):
        domain = make_domain(machine, frame_order=5)
        given = [np.flatnonzero(machine.owner == domain.domid), domain.allocate(20)]
        assert domain.grants.setup(3) == 0
        given.append(domain.grants.frames)
        given.append(memory._take(Hypervisor(domain, {}), 4))
        assert all(len(mfns) for mfns in given)
        return [[int(mfn) for mfn in mfns] for mfns in given]

    first, second = machines.make(8 * MIB, seed=1), machines.make(8 * MIB, seed=2)
    second.free(second.allocate(9, 50))
    assert frames_of(first) == frames_of(second)
    assert (first.allocate(2, 9) != second.allocate(2, 9)).any()


# -- descriptor tables ---


def test_the_gdt_is_what_the_guest_gave(guest):
    """set_gdt takes its frames as descriptor pages and maps them, with Xen's own at page 14; the
    next one gives the old ones back."""
    tables, domain, vcpu = guest.tables, guest.domain, guest.vcpu
    for slot in (5, 6):
        tables.update_entry(guest.l1, slot, 0)
    guest.poke(5, 8, struct.pack("<Q", CODE))
    five, six = guest.frames[5], guest.frames[6]
    assert domain.set_gdt(vcpu, [five, six], 600) == 0
    assert (tables.ptype[five], tables.count[five]) == (PGT_SEG_DESC, 1)
    assert list(vcpu.context.gdt_frames)[:3] == [five, six, 0]
    assert vcpu.context.gdt_ents == 600
    row = guest.machine.mem[domain._l1, :16] >> np.uint64(12)
    assert row[:2].tolist() == [five, six]
    reserved = guest.machine.mem[int(row[RESERVED_GDT_PAGE])]
    assert reserved[0xE033 // 8 - RESERVED_GDT_PAGE * 512] == 0x00AFFB000000FFFF
    assert row[2:14].tolist() == [domain._zero] * 12
    assert not guest.machine.mem[domain._zero].any()
    assert domain.set_gdt(vcpu, [six], 512) == 0
    assert tables.count[five] == 0
    assert tables.count[six] == 1
    assert domain.set_gdt(vcpu, [], 0) == 0
    assert tables.count[six] == 0


def test_a_refused_gdt_changes_nothing(guest):
    """If one frame will not do (it is mapped writable, or a gate is in it), none is taken and the
    old table stays."""
    tables, domain, vcpu = guest.tables, guest.domain, guest.vcpu
    for slot in (5, 6, 7):
        tables.update_entry(guest.l1, slot, 0)
    five, six, seven = guest.frames[5:8]
    assert domain.set_gdt(vcpu, [five], 512) == 0
    guest.poke(7, 0, struct.pack("<Q", 0x00008E0000000000))
    for bad in (guest.frames[8], seven, guest.l1, domain.scratch_mfn, 0):
        assert domain.set_gdt(vcpu, [six, bad], 1024) == -errno.EINVAL
        assert tables.count[six] == 0
        assert tables.count[five] == 1
        assert list(vcpu.context.gdt_frames)[:2] == [five, 0]


def test_the_guest_cannot_reach_its_gdt_mapping(guest):
    """Xen's mapping of the GDT is not the guest's to read or write."""
    for write in (False, True):
        assert guest.tables.walk(guest.l4, PERDOMAIN_VA, write=write) == -1


def test_a_crash_is_the_first_one(guest):
    """The first crash is kept, with its message, and told on the console."""
    guest.domain.crash("first")
    guest.domain.crash("second")
    assert guest.domain.shutdown_reason == SHUTDOWN_CRASH
    assert guest.domain.crash_message == "first"
    assert b"crashed: first" in (guest.machine.directory / "console-1.log").read_bytes()


def test_a_page_given_to_xen_stays_writable(ringed):
    """The guest may go on mapping a ring as it likes: holding it refuses no mapping."""
    mfn = ringed.frames[CONSOLE]
    assert ringed.tables.ptype[mfn] == PGT_WRITABLE
    assert ringed.tables.update_entry(ringed.l1, 300, mfn << 12 | FULL) == 0
    assert ringed.tables.update_entry(ringed.l1, 300, 0) == 0
