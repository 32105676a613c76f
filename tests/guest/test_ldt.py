"""Local descriptor tables: which a guest may have, that the CPU uses them, and who keeps them."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.guest.calling import REFUSED
from tests.guest.rig import FULL, READ_ONLY
from tests.guest.test_user_space import CS32, DEC_SYSCALL, Process
from xsave.guest.xen import cpuregs
from xsave.guest.xen.adopt import adopt_context
from xsave.guest.xen.cpuregs import RAX
from xsave.guest.xen.pagetypes import PGT_NONE, PGT_SEG_DESC

LDT = 9  # the page of the guest's
DATA, CODE32, CODE16, GATE = (
    0x00CFF3000000FFFF,
    0x00CFFB000000FFFF,
    0x008FFB000000FFFF,
    0xEC00 << 32,
)
MOV_GS = b"\x8e\xe8"  # mov gs, eax
READ_GS = b"\x65\x8b\x04\x25\0\0\0\0"  # mov eax, gs:[0]


def based(descriptor, base):
    return descriptor | (base & 0xFFFFFF) << 16 | (base >> 24) << 56


def write_protect(guest, page):
    assert guest.tables.update_entry(guest.l1, page, guest.frames[page] << 12 | READ_ONLY) == 0


def set_ldt(guest, address, entries):
    """MMUEXT_SET_LDT, by the guest's own hypercall; its result."""
    guest.poke(3, 0, struct.pack("<IIQQ", 13, 0, address, entries))
    guest.run(b"\xb8\x1a\x00\x00\x00\x0f\x05", rdi=guest.va(3), rsi=1, rdx=0, r10=0x7FF0)
    return guest.hv.q[RAX]


@pytest.fixture
def local(guest):
    """A guest with an LDT: data at page 5 in entry 1, code of 32 and 16 bits in 2 and 3."""
    for vector in (6, 11, 13, 14):
        guest.set_handler(vector)
    guest.power_on()
    entries = (0, based(DATA, guest.va(5)), CODE32, CODE16, based(CODE32, guest.va(7)), DATA)
    guest.poke(LDT, 0, struct.pack("<6Q", *entries))
    guest.poke(5, 0, b"abcd")
    write_protect(guest, LDT)
    assert set_ldt(guest, guest.va(LDT), 6) == 0
    return guest


def selector(index):
    return index << 3 | 7


def frame_type(guest, page=LDT):
    mfn = guest.frames[page]
    return guest.tables.ptype[mfn], guest.tables.count[mfn]


def load(guest, index):
    """Load GS from the LDT and read through it; where that stopped."""
    return guest.run(MOV_GS + READ_GS, rax=selector(index))


def test_a_segment_of_the_ldt(local):
    """Its page is taken as one of segment descriptors when it is needed, not before; twice used,
    it is taken once."""
    assert frame_type(local)[0] == PGT_NONE
    for _ in range(2):
        assert load(local, 1) == local.va(0, len(MOV_GS + READ_GS))
        assert local.hv.q[RAX] == int.from_bytes(b"abcd", "little")
        assert frame_type(local) == (PGT_SEG_DESC, 1)


def test_nobody_writes_it_meanwhile(local):
    """While the CPU may look at it no writable mapping is allowed; with another LDT it is."""
    load(local, 1)
    writable = local.frames[LDT] << 12 | FULL
    assert local.tables.update_entry(local.l1, LDT, writable) == -errno.EBUSY
    assert set_ldt(local, 0, 0) == 0
    assert frame_type(local) == (PGT_NONE, 0)
    assert local.tables.update_entry(local.l1, LDT, writable) == 0
    assert load(local, 1) == local.vcpu.traps[13][0]
    assert local.stacked(3)[2] == selector(1) & ~3


def test_what_is_not_there(local):
    """An entry behind the end or that is empty is a protection fault, one of a page that may not
    be used a page fault at the guest's own address of it."""
    for index in (6, 511, 8191):
        assert load(local, index) == local.vcpu.traps[13][0]
        assert local.stacked(3)[2] == selector(index) & ~3
    assert set_ldt(local, local.va(LDT), 600) == 0  # the second page is a plain, writable one
    assert load(local, 1) == local.va(0, len(MOV_GS + READ_GS))
    assert load(local, 513) == local.vcpu.traps[14][0]
    assert local.vcpu.info.cr2 == local.va(LDT + 1, 8)
    local.poke(LDT + 1, 8, struct.pack("<Q", based(DATA, local.va(5))))
    write_protect(local, LDT + 1)
    assert load(local, 513) == local.va(0, len(MOV_GS + READ_GS))
    assert frame_type(local, LDT + 1) == (PGT_SEG_DESC, 1)


def test_descriptors_are_checked(local):
    """A page with a gate in it is none; user privilege is put into those that lack it."""
    assert set_ldt(local, local.va(LDT + 1), 10) == 0
    local.poke(LDT + 1, 0, struct.pack("<3Q", 0, based(DATA & ~(3 << 45), local.va(5)), GATE))
    write_protect(local, LDT + 1)
    assert load(local, 1) == local.vcpu.traps[14][0]
    assert frame_type(local, LDT + 1) == (PGT_NONE, 0)
    local.poke(LDT + 1, 16, bytes(8))
    assert load(local, 1) == local.va(0, len(MOV_GS + READ_GS))
    (entry,) = struct.unpack("<Q", local.peek(LDT + 1, 8, 8))
    assert entry >> 45 & 3 == 3


def test_update_descriptor(local):
    """A page in use is changed by hypercall, with the same checks, and the CPU sees it."""
    load(local, 1)
    local.poke(6, 0, b"wxyz")
    at = (local.frames[LDT] << 12) + 8
    assert local.hv.call(10, at, GATE, 0, 0, 0) == REFUSED
    assert local.hv.call(10, at, based(DATA, local.va(6)), 0, 0, 0) == 0
    load(local, 1)
    assert local.hv.q[RAX] == int.from_bytes(b"wxyz", "little")


@pytest.mark.parametrize("ldt", [(8, 5), (0, 8193), (0xFFFF_8000_0000_0000, 5), (1 << 47, 5)])
def test_what_is_no_ldt(local, ldt):
    """As do_mmuext_op has it; the one before stays. The same of a context."""
    assert set_ldt(local, *ldt) == REFUSED & (1 << 64) - 1
    assert load(local, 1) == local.va(0, len(MOV_GS + READ_GS))
    local.hv.read_registers()
    local.vcpu.context.ldt_base, local.vcpu.context.ldt_ents = ldt
    assert "LDT" in adopt_context(local.domain, local.vcpu, bytes(local.vcpu.context))


def test_it_is_in_the_context(local):
    """Whoever takes the context over has the LDT, and its pages anew."""
    load(local, 1)
    local.hv.read_registers()
    blob = bytes(local.vcpu.context)
    assert adopt_context(local.domain, local.vcpu, blob) == ""
    assert (local.vcpu.context.ldt_base, local.vcpu.context.ldt_ents) == (local.va(LDT), 6)
    assert frame_type(local) == (PGT_NONE, 0)
    local.hv.power_on()
    assert load(local, 1) == local.va(0, len(MOV_GS + READ_GS))
    assert frame_type(local) == (PGT_SEG_DESC, 1)


# -- user space ---


@pytest.fixture
def process(local):
    process = Process(local)
    local.syscall = local.set_handler(40)
    local.vcpu.context.syscall_callback_eip = local.syscall
    return process


def test_code_of_the_ldt(process):
    """iret to a code segment of the LDT: 32 and 16 bits, and one that does not begin at 0, where
    the kernel is told the offset and comes back to it."""
    guest = process.guest
    assert process.run(DEC_SYSCALL, cs=selector(2), rax=5) == guest.syscall
    assert guest.hv.q[RAX] == 4
    assert process.run(b"\xb8\x34\x12\x90\x90\x0f\x05", cs=selector(3)) == guest.syscall
    assert guest.hv.q[RAX] == 0x1234  # mov ax, 0x1234; nop; nop
    assert guest.run(b"\x48\xff\xc0\xb8\x01\0\0\0", rax=0) == guest.va(0, 8)  # 64 bits again
    assert guest.hv.q[RAX] == 1
    code = b"\x40\x0f\x05"  # inc eax; syscall
    guest.poke(7, 0, b"\x0f\x0b" + code)
    guest.hv.cpu.forget_code()
    frame = [3, 0, 0, 0, 2, selector(4), 0x202, guest.va(9), 0xE02B]
    guest.poke(1, 1024, struct.pack("<9Q", *frame))
    assert guest.run(b"\x0f\x05", rax=23, rsp=guest.va(1, 1024)) == guest.syscall
    assert guest.hv.q[RAX] == 4
    _, _, rip, cs, *_ = guest.stacked(7)
    assert (rip, cs & 0xFFFF) == (5, selector(4))
    assert guest.hv.q[cpuregs.CS_BASE] == 0


def test_data_of_the_ldt_in_32_bits(process):
    """A data segment that does not begin at 0 keeps its base from one stay in user space to the
    next, and costs the kernel nothing."""
    guest = process.guest
    guest.poke(8, 0, b"efgh")
    guest.hv.call(10, (guest.frames[LDT] << 12) + 8, based(DATA, guest.va(8)), 0, 0, 0)
    guest.vcpu.extended.syscall32_callback_eip = guest.syscall
    load_ds = b"\xb8" + struct.pack("<I", selector(1)) + b"\x8e\xd8\x0f\x05"  # mov ds, eax
    assert process.run(load_ds, cs=CS32) == guest.syscall
    assert guest.run(b"\x48\x8b\x07", rdi=guest.va(8)) == guest.va(0, 3)
    assert guest.hv.q[RAX] & 0xFFFFFFFF == int.from_bytes(b"efgh", "little")
    assert process.run(b"\xa1\0\0\0\0\x0f\x05", cs=CS32) == guest.syscall  # mov eax, [0]
    assert guest.hv.q[RAX] == int.from_bytes(b"efgh", "little")
