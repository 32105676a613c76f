"""Emulated stores to page tables, against the emulator's own execution on an ordinary page."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.rig import FULL, READ_ONLY, VA, Guest
from xsave.frames import PTE_PCD, PTE_PRESENT, PTE_USER
from xsave.guest.xen.cpuregs import RBX, RDI, RIP
from xsave.guest.xen.hypervisor import TRAP_PAGE_FAULT, VMASST_WRITABLE_PAGETABLES
from xsave.guest.xen.ptwr import emulate_table_write

M64 = (1 << 64) - 1
ARITHMETIC = 0x8D5  # OF SF ZF AF PF CF
CF, ZF, DF = 1, 0x40, 0x400
PLAIN, SOURCE = 3, 4
#: A slot of the guest's L1 whose address the stores go to: far behind those in use.
SLOT = 400
SOURCE_VA = VA + (SOURCE << 12) + 2048
OPERAND_SIZES = (1, 2, 4, 8)


def encode(opcode, size, tail, *, lock=False, rep=False):
    """An instruction of this operand size; byte forms have the even opcode below the others'."""
    prefix = (b"\xf3" if rep else b"") + (b"\xf0" if lock else b"")
    if size == 2:
        prefix = b"\x66" + prefix
    rex = b"\x48" if size == 8 else b""
    *escape, last = opcode
    last = last & ~1 if size == 1 else last
    return prefix + rex + bytes([*escape, last]) + tail


RBX_TO_RDI = b"\x1f"  # modrm [rdi], rbx


def immediate(size, value):
    return (value & M64).to_bytes(8, "little")[: min(size, 4)]


def group(extension, size, value):
    """modrm [rdi] with an opcode extension, and an immediate."""
    return bytes([extension << 3 | 7]) + immediate(size, value)


def stores(size, value):
    """Every store the emulation knows, at this operand size: name -> (code, flags to compare)."""
    every = {
        "mov": (encode(b"\x89", size, RBX_TO_RDI), M64),
        "mov immediate": (encode(b"\xc7", size, group(0, size, value)), M64),
        "xchg": (encode(b"\x87", size, RBX_TO_RDI), M64),
        "lock cmpxchg": (encode(b"\x0f\xb1", size, RBX_TO_RDI, lock=True), M64),
        "cmpxchg": (encode(b"\x0f\xb1", size, RBX_TO_RDI), M64),
    }
    for name, opcode, extension in (("or", 0x09, 1), ("and", 0x21, 4), ("xor", 0x31, 6)):
        every[name] = encode(bytes([opcode]), size, RBX_TO_RDI), M64
        every["lock " + name] = encode(bytes([opcode]), size, RBX_TO_RDI, lock=True), M64
        every[name + " immediate"] = encode(b"\x81", size, group(extension, size, value)), M64
        if size > 1:  # a sign-extended byte
            code = encode(b"\x83", size, bytes([extension << 3 | 7, value & 0xFF]))
            every[name + " byte"] = code, M64
    if size > 1:
        for name, opcode, extension in (("bts", 0xAB, 5), ("btr", 0xB3, 6)):
            tail = bytes([extension << 3 | 7, value & 0xFF])
            every[name + " immediate"] = encode(b"\x0f\xba", size, tail), CF | ZF | DF
            code = encode(bytes([0x0F, opcode]), size, RBX_TO_RDI, lock=True)
            every["lock " + name] = code, CF | ZF | DF
    if size >= 4:
        every["movnti"] = encode(b"\x0f\xc3", size, RBX_TO_RDI), M64
    if size == 8:
        every |= {
            "stosq": (b"\x48\xab", M64),
            "movsq": (b"\x48\xa5", M64),
            "rep stosq": (b"\xf3\x48\xab", M64),
            "rep movsq": (b"\xf3\x48\xa5", M64),
        }
    return every


NAMES = [(name, size) for size in OPERAND_SIZES for name in stores(size, 1)]


class Pair:
    """One guest that runs an instruction on a plain page and on its own L1 table."""

    def __init__(self, machine):
        self.guest = guest = Guest(machine)
        guest.domain.vm_assist = VMASST_WRITABLE_PAGETABLES
        self.handler = guest.set_handler(TRAP_PAGE_FAULT)
        self.table = guest.nr  # the L1, mapped read-only behind the plain pages
        guest.power_on()

    def run(self, page, code, memory, registers, rflags):
        """Return (8 entries around the slot, registers, flags, where it stopped)."""
        guest = self.guest
        entries = guest.machine.mem[guest.frames[page], SLOT - 4 : SLOT + 4]
        entries[:] = memory
        guest.poke(SOURCE, 2016, struct.pack("<8Q", *(0xABCDEF00 + 2 * i for i in range(8))))
        guest.hv.cpu.rflags = rflags
        rdi = registers["rdi"] + guest.va(page, SLOT * 8)
        stopped = guest.run(code, **registers | {"rdi": rdi})
        q = guest.hv.q
        general = [q[i] - (guest.va(page) if i == RDI else 0) for i in range(16)]
        after = entries.tolist()
        entries[:] = 0
        return after, general, guest.hv.cpu.rflags, stopped


@pytest.fixture(scope="module")
def pair(module_machine):
    return Pair(module_machine)


#: Mostly values whose lowest bit is clear: what they make of an entry is not present.
quadwords = st.integers(0, M64 >> 1).map(lambda n: 2 * n) | st.sampled_from(
    [0, 1, M64, M64 - 1, 1 << 63, 0x80, 0x8000, 1 << 31, 0xFEDCBA9876543210]
)


@st.composite
def situations(draw, name, size):
    """Memory and registers in which to run the store of this name and operand size."""
    offset = draw(st.integers(0, 8 // size - 1)) * size
    memory = [value & ~PTE_PRESENT for value in draw(st.lists(quadwords, min_size=8, max_size=8))]
    equal = memory[4] >> 8 * offset & (1 << 8 * size) - 1
    registers = {
        "rax": draw(quadwords | st.just(equal)),
        "rbx": draw(quadwords),
        "rcx": draw(st.integers(1, 3)),
        "rdx": draw(quadwords),
        "rdi": offset,
    }
    if "cmpxchg" in name and size == 4:
        # The emulator clears the upper half of rax also where the CPU leaves it alone.
        registers["rax"] &= 0xFFFFFFFF
    if "bt" in name:  # a register's bit number reaches beyond the operand
        registers["rbx"] %= 8 * size
    flags = draw(st.integers(0, M64)) & ARITHMETIC | 0x202
    if "sq" in name:
        registers |= {"rsi": SOURCE_VA, "rdi": 0, "rax": registers["rax"] & ~PTE_PRESENT}
        flags |= DF * draw(st.integers(0, 1))
    return memory, registers, flags, draw(st.integers(-(1 << 30), (1 << 30) - 1)) * 2


@pytest.mark.parametrize(("name", "size"), NAMES)
def test_a_store_does_what_the_cpu_does(pair, name, size):
    """Memory, registers, flags and rip after an emulated store to a page table are those after
    the same instruction on an ordinary page."""
    compared_once = False

    @settings(max_examples=20)
    @given(situations(name, size))
    def check(situation):
        nonlocal compared_once
        memory, registers, flags, value = situation
        code, mask = stores(size, value)[name]
        native = pair.run(PLAIN, code, memory, registers, flags)
        if any(entry & PTE_PRESENT for entry in native[0]):
            return  # no entry that a table may hold
        emulated = pair.run(pair.table, code, memory, registers, flags)
        compared_once = True
        assert emulated[0] == native[0]
        assert emulated[1] == native[1]
        assert emulated[2] & mask == native[2] & mask
        assert emulated[3] == native[3]

    check()
    assert compared_once


# -- what is accepted and what is refused ---

#: Stores the emulation does not know, to [rdi].
UNKNOWN = {
    "add": b"\x48\x01\x1f",
    "inc": b"\x48\xff\x07",
    "xadd": b"\x48\x0f\xc1\x1f",
    "cmpxchg16b": b"\x48\x0f\xc7\x0f",
    "movaps": b"\x0f\x29\x07",
    "mov from a segment register": b"\x8c\xdf\x8c\x1f",
    "mov ah": b"\x88\x27",
}
MOV = b"\x48\x89\x1f"  # mov [rdi], rbx


def store(guest, value, *, offset=0, code=MOV, slot=SLOT, **registers):
    """Run a store to the guest's own L1; return (entry, where it stopped)."""
    rdi = guest.va(guest.nr, 8 * slot + offset)
    stopped = guest.run(code, rdi=rdi, rbx=value, **registers)
    return int(guest.machine.mem[guest.l1, slot]), stopped


@pytest.fixture
def linux_like(guest):
    """A guest that relies on writable page tables and handles page faults."""
    guest.domain.vm_assist = VMASST_WRITABLE_PAGETABLES
    guest.handler = guest.set_handler(TRAP_PAGE_FAULT)
    return guest


def test_an_accepted_entry_counts_and_maps(linux_like):
    """A store of a present entry takes the references an mmu_update takes, and the page is there;
    storing zero over it gives them back, and the page is gone with the next flush."""
    guest = linux_like
    mfn = guest.frames[PLAIN]
    count, refs = guest.tables.count[mfn], guest.tables.refs[mfn]
    entry, _ = store(guest, mfn << 12 | FULL & ~PTE_USER)
    assert entry == mfn << 12 | FULL
    assert (guest.tables.count[mfn], guest.tables.refs[mfn]) == (count + 1, refs + 1)
    alias = VA + SLOT * 4096
    guest.run(b"\x48\x89\x1f", rdi=alias, rbx=0x1234)
    assert guest.peek(PLAIN, 0, 2) == b"\x34\x12"
    assert store(guest, 0)[0] == 0
    assert (guest.tables.count[mfn], guest.tables.refs[mfn]) == (count, refs)
    assert guest.tables.unflushed
    guest.hv.cpu.flush_page(alias)
    assert guest.run(b"\x48\x89\x1f", rdi=alias) == guest.handler


def test_a_refused_entry_faults(linux_like):
    """An entry that mmu_update would refuse is not stored: the guest gets its page fault, for a
    write in its kernel, at the store, with its registers as they were."""
    guest = linux_like
    foreign = int(guest.machine.allocate(2, 1)[0])
    for value in (
        guest.l2 << 12 | FULL,  # a page table, writable
        foreign << 12 | PTE_PRESENT,
        guest.domain.scratch_mfn << 12 | PTE_PRESENT,  # Xen's
        guest.machine.nr_frames << 12 | PTE_PRESENT,
        guest.frames[PLAIN] << 12 | FULL | PTE_PCD,
    ):
        refs = bytes(guest.tables.refs), bytes(guest.tables.count)
        rsp = guest.va(2, -64)
        entry, stopped = store(guest, value, rsp=rsp, rcx=1, r11=2)
        assert entry == 0
        assert stopped == guest.handler
        rcx, r11, code, rip, cs, _, old_rsp, _ = guest.stacked(8)
        assert (rcx, r11, rip, old_rsp) == (1, 2, guest.va(0), rsp)
        assert code == 3
        assert cs & 3 == 0
        assert guest.vcpu.info.cr2 == guest.va(guest.nr, 8 * SLOT)
        assert refs == (bytes(guest.tables.refs), bytes(guest.tables.count))


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_store_faults(linux_like, name):
    """An instruction that is not emulated changes nothing: the guest gets its page fault."""
    entry, stopped = store(linux_like, 0x1000, code=UNKNOWN[name], rdx=0, rax=0)
    assert (entry, stopped) == (0, linux_like.handler)


def test_a_store_across_two_entries_faults(linux_like):
    """A store that straddles two entries is not emulated."""
    assert store(linux_like, 0x1000, offset=4) == (0, linux_like.handler)


def test_without_the_assist_a_table_is_read_only(linux_like):
    """A guest that did not ask for VMASST_writable_pagetables gets its page fault."""
    linux_like.domain.vm_assist = 0
    assert store(linux_like, 0x1000) == (0, linux_like.handler)


def test_a_read_only_page_that_is_no_table_faults(linux_like):
    """Only page tables are emulated; another page mapped read-only stays so."""
    guest = linux_like
    alias = guest.va(SLOT)
    mfn = guest.frames[PLAIN]
    assert guest.tables.update_entry(guest.l1, SLOT, mfn << 12 | READ_ONLY) == 0
    assert guest.run(MOV, rdi=alias, rbx=1) == guest.handler
    assert guest.peek(PLAIN, 0, 1) == b"\0"


def decoded_at(guest, page, offset, code):
    """Put code there, emulate it as a store to the L1 and see it done."""
    guest.tables.update_entry(guest.l1, SLOT, guest.l1 << 12 | READ_ONLY)
    guest.power_on()
    at = guest.frames[page] << 12 | offset
    guest.machine.map[at : at + min(len(code), 4096 - offset)] = code[: 4096 - offset]
    if rest := code[4096 - offset :]:
        guest.poke(page + 1, 0, rest)
    guest.hv.q[RIP], guest.hv.q[RBX] = guest.va(page, offset), 0x77000
    assert emulate_table_write(guest.hv, guest.va(SLOT, 8 * (SLOT + 1)))
    assert guest.machine.mem[guest.l1, SLOT + 1] == 0x77000
    assert guest.hv.q[RIP] == guest.va(page, offset + len(code))


@pytest.mark.parametrize("prefixes", range(12))
def test_the_instruction_may_end_its_page(linux_like, prefixes):
    """An instruction of any length is decoded at the very end of the last mapped page."""
    guest, code = linux_like, b"\x2e" * prefixes + MOV
    for slot in range(guest.nr, guest.nr + 4):
        guest.tables.update_entry(guest.l1, slot, 0)
    decoded_at(guest, guest.nr - 1, 4096 - len(code), code)


@pytest.mark.parametrize("before", [1, 2])
def test_the_instruction_may_cross_pages(linux_like, before):
    """An instruction is decoded that begins in one page and ends in the next."""
    decoded_at(linux_like, 3, 4096 - before, MOV)


def test_only_stores_to_l1_tables_are_emulated(guest):
    """A store to an L2, L3 or L4 table, of its own value even, is the guest's page fault, as on
    Xen: those change by hypercall."""
    handler = guest.set_handler(TRAP_PAGE_FAULT)
    guest.domain.vm_assist = VMASST_WRITABLE_PAGETABLES
    for page in range(guest.nr, guest.nr + 4):
        table = guest.frames[page]
        expected = guest.va(0, 3) if table == guest.l1 else handler
        old = int(guest.machine.mem[table, 511])
        assert guest.run(b"\x48\x89\x1f", rdi=guest.va(page, 8 * 511), rbx=old) == expected
