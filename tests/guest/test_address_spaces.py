"""After a change of address space a guest finds what its page tables say, and nothing older: of the
TLB, the library (spaces.c) keeps what it can know to be the same."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.rig import FULL, HANDLERS, MIB, READ_ONLY, VA, Guest, Machines
from xsave.frames import PAGE_SHIFT, PTE_PRESENT, PTE_RW
from xsave.guest.xen import fastpath, tlb
from xsave.guest.xen.fastpath import NR_CROSSINGS
from xsave.guest.xen.pagetypes import PGT_L4
from xsave.guest.xen.time import RealClock

pytestmark = pytest.mark.skipif(fastpath.library() is None, reason="no library for this machine")

NR = 40
ARGUMENTS, OUT = 4, 5
#: Pages whose entries change, in two L1 tables, and the frames these may name.
PAGES = range(8, 16)
ROOTS, OTHER_TABLES = range(32, 36), (36, 37, 38)
UPPER_SLOT = 300
UPPER = 0xFFFF << 48 | UPPER_SLOT << 39 | VA
LOWER_HALF, UPPER_HALF = VA, UPPER
DOMID_SELF, MMU_UPDATE, MMUEXT_OP = 0x7FF0, 1, 26
USER_MODE = 1


class Spaces:
    """A guest with four address spaces, of which a model says what is where."""

    def __init__(self, machines: Machines) -> None:
        machine = machines.make(16 * MIB)
        guest = self.guest = Guest(machine, NR)
        guest.domain.clock = RealClock()
        guest.domain.clock.start()
        mem, frames = machine.mem, guest.frames
        self.handler = guest.set_handler(14)
        for page in PAGES:  # mov eax, page; ret; and the page's number
            guest.poke(page, 0, struct.pack("<BIBHQ", 0xB8, page, 0xC3, 0, page))
        other_l1, other_l2, other_l3 = (frames[page] for page in OTHER_TABLES)
        mem[other_l1] = mem[guest.l1]
        mem[other_l1, 16:] = 0
        for page in PAGES:  # the other way round
            mem[other_l1, page] = frames[PAGES[0] + PAGES[-1] - page] << PAGE_SHIFT | FULL
        mem[other_l2, VA >> 21 & 511] = other_l1 << PAGE_SHIFT | FULL
        mem[other_l3, VA >> 30 & 511] = other_l2 << PAGE_SHIFT | FULL
        for page in (*ROOTS, *OTHER_TABLES):
            entry = frames[page] << PAGE_SHIFT | READ_ONLY
            assert guest.tables.update_entry(guest.l1, page, entry) == 0
        #: What each root has for a lower and an upper half: 0 the usual, 1 the other tables.
        self.halves = {32: (0, 0), 33: (0, 0), 34: (1, 0), 35: (0, 1)}
        for page, halves in self.halves.items():
            root = frames[page]
            for slot, half in zip((0, UPPER_SLOT), halves, strict=True):
                mem[root, slot] = (other_l3 if half else guest.l3) << PAGE_SHIFT | FULL
            assert guest.tables.pin(root, PGT_L4) == 0
        self.l1s, self.l2s = (guest.l1, other_l1), (guest.l2, other_l2)
        self.entries = [
            {page: int(mem[l1, page]) & ~0xFFF | FULL for page in PAGES} for l1 in self.l1s
        ]
        self.below = [0, 1]  # the L1 table that each L2 table names
        self.root = None
        guest.power_on()
        self.go([], 32, None)

    def entry(self, half: int, page: int) -> int:
        """What the model finds at a page of a half of the address space."""
        l3 = self.halves[self.root][half == UPPER_HALF]
        return self.entries[self.below[l3]][page]

    def page_of(self, entry: int) -> int:
        return self.guest.frames.index(entry >> PAGE_SHIFT & (1 << 40) - 1)

    def go(self, changes, root: int, probe) -> None:
        """Use everything, change entries, change to an address space and look at everything; then
        do what may fault."""
        guest, code = self.guest, b""
        if self.root is not None:
            for half, page, entry in self.mapped():
                code += read(address(half, page, 8)) + call(address(half, page, 0))
                if entry & PTE_RW:
                    code += write(address(half, page, 16))
        for number, (quick, *change) in enumerate(changes):
            guest.poke(ARGUMENTS, 16 * number, struct.pack("<QQ", *self.change(*change)))
            done = 0 if quick else guest.va(ARGUMENTS, 0xFF8)
            code += hypercall(MMU_UPDATE, guest.va(ARGUMENTS, 16 * number), 1, done, DOMID_SELF)
        base = struct.pack("<IIQQIIQQ", 5, 0, guest.frames[root], 0, 15, 0, 0, 0)
        guest.poke(ARGUMENTS, 0xF00, base)
        code += hypercall(MMUEXT_OP, guest.va(ARGUMENTS, 0xF00), 2, 0, DOMID_SELF)
        self.root = root
        expected = []
        # The last first: the two halves' entries and blocks drive each other out.
        for half, page, entry in [*self.mapped()][::-1]:
            for look in (read(address(half, page, 8)), call(address(half, page, 0))):
                code += look + store(guest.va(OUT, 8 * len(expected)))
                expected.append(self.page_of(entry))
        before_probe = len(code)
        faults = False
        if probe is not None:
            half, page, writes = probe
            code += (write if writes else read)(address(half, page, 16))
            faults = not self.entry(half, page) & (PTE_RW if writes else PTE_PRESENT)
        stopped = guest.run(code)
        seen = struct.unpack(f"<{len(expected)}Q", guest.peek(OUT, 0, 8 * len(expected)))
        assert list(seen) == expected
        assert stopped == (self.handler if faults else guest.va(0, len(code)))
        if faults:
            assert guest.stacked(4)[3] == guest.va(0, before_probe)

    def change(self, kind: str, table: int, page: int, target: int, flags: int):
        """Change the model; return the request that has the guest do the same."""
        frames = self.guest.frames
        if kind == "l2":
            self.below[table] = target & 1
            slot, value = VA >> 21 & 511, self.l1s[target & 1] << PAGE_SHIFT | FULL
            return self.l2s[table] << PAGE_SHIFT | 8 * slot, value
        value = frames[target] << PAGE_SHIFT | flags
        self.entries[table][page] = value
        return self.l1s[table] << PAGE_SHIFT | 8 * page, value

    def mapped(self):
        for half in (LOWER_HALF, UPPER_HALF):
            for page in PAGES:
                if (entry := self.entry(half, page)) & PTE_PRESENT:
                    yield half, page, entry

    def nr_used(self) -> int:
        """How many entries the emulator counts in its TLB."""
        return self.guest.hv.cpu._tlb._words[USER_MODE * tlb._DESCRIPTOR_WORDS + tlb._USED]


def address(half: int, page: int, offset: int) -> int:
    return half + (page << PAGE_SHIFT) + offset


def read(at: int) -> bytes:
    return b"\x48\xa1" + struct.pack("<Q", at)  # mov rax, [at]


def write(at: int) -> bytes:
    return store(at)


def store(at: int) -> bytes:
    return b"\x48\xa3" + struct.pack("<Q", at)  # mov [at], rax


def call(at: int) -> bytes:
    return b"\x48\xb8" + struct.pack("<Q", at) + b"\xff\xd0"  # mov rax, at; call rax


def hypercall(number: int, *arguments: int) -> bytes:
    loads = (b"\x48\xbf", b"\x48\xbe", b"\x48\xba", b"\x49\xba")  # rdi, rsi, rdx, r10
    code = b"".join(
        load + struct.pack("<Q", value) for load, value in zip(loads, arguments, strict=True)
    )
    return code + b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"


@pytest.fixture
def spaces(machines):
    return Spaces(machines)


flags = st.sampled_from([FULL, FULL, READ_ONLY, 0])
page = st.sampled_from(PAGES)
change = st.tuples(
    st.sampled_from([True, True, True, True, False]),
    st.sampled_from(["l1"] * 9 + ["l2"]), st.integers(0, 1), page, page, flags,
)  # fmt: skip
probe = st.tuples(st.sampled_from([LOWER_HALF, UPPER_HALF]), page, st.booleans())
step = st.tuples(
    st.lists(change, max_size=4) | st.lists(change, min_size=15, max_size=24),
    st.sampled_from([*ROOTS, 32, 33]), probe,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(step, min_size=1, max_size=8))
def test_what_the_tables_say_is_what_the_guest_finds(steps):
    machines = Machines()
    try:
        spaces = Spaces(machines)
        for changes, root, looked_at in steps:
            spaces.go(changes, root, looked_at)
    finally:
        machines.close()


def test_more_has_changed_than_can_be_remembered(spaces):
    """Each entry of twenty shows what another did."""
    pages = range(8, 28)
    guest = spaces.guest
    for page in pages:
        guest.poke(page, 8, struct.pack("<Q", page))
    code = b"".join(read(address(UPPER_HALF, page, 8)) for page in pages)
    for number, page in enumerate(pages):
        target = pages[number - 1]
        at = guest.va(ARGUMENTS, 16 * number)
        entry = guest.frames[target] << PAGE_SHIFT | FULL
        request = struct.pack("<QQ", guest.l1 << PAGE_SHIFT | 8 * page, entry)
        guest.poke(ARGUMENTS, 16 * number, request)
        code += hypercall(MMU_UPDATE, at, 1, 0, DOMID_SELF)
    guest.poke(ARGUMENTS, 0xF00, struct.pack("<IIQQIIQQ", 5, 0, guest.frames[33], 0, 15, 0, 0, 0))
    code += hypercall(MMUEXT_OP, guest.va(ARGUMENTS, 0xF00), 2, 0, DOMID_SELF)
    for number, page in enumerate(pages):
        code += read(address(UPPER_HALF, page, 8)) + store(guest.va(OUT, 8 * number))
    guest.run(code)
    found = struct.unpack(f"<{len(pages)}Q", guest.peek(OUT, 0, 8 * len(pages)))
    assert list(found) == [pages[-1], *pages[:-1]]


def test_what_all_address_spaces_share_stays(spaces):
    """Linux changes to another address space and back for each patch of its code."""
    spaces.go([], 33, None)
    guest, quick = spaces.guest, spaces.guest.hv.fastpath.words[NR_CROSSINGS]
    guest.poke(ARGUMENTS, 0xF00, struct.pack("<IIQQIIQQ", 5, 0, guest.frames[32], 0, 15, 0, 0, 0))
    code = b"".join(read(address(UPPER_HALF, page, 8)) for page in PAGES)
    guest.run(code + hypercall(MMUEXT_OP, guest.va(ARGUMENTS, 0xF00), 2, 0, DOMID_SELF))
    assert guest.hv.fastpath.words[NR_CROSSINGS] == quick + 1
    assert len(PAGES) <= spaces.nr_used() <= len(PAGES) + len((0, HANDLERS, ARGUMENTS, OUT))


def test_a_full_tlb_grows(spaces):
    """What stays must not keep the table as small as it was."""
    guest, before = spaces.guest, spaces.guest.hv.cpu._tlb.entries()[USER_MODE]
    words, at = guest.hv.cpu._tlb._words, USER_MODE * tlb._DESCRIPTOR_WORDS + tlb._USED
    words[at] = before * 3 // 4
    spaces.go([], 33, None)
    assert guest.hv.cpu._tlb.entries()[USER_MODE] == 2 * before
