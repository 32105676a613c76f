"""The vCPU's context, xen_version, multicall and the rest: one hypercall after the other."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.guest.calling import ARGS, FAULT, M2P, M64, OUT, REFUSED, UNKNOWN, call
from tests.guest.pagetable_model import CODE
from xsave.guest.xen.cpuregs import FS_BASE, GS_BASE
from xsave.guest.xen.pagetypes import PGT_SEG_DESC

UPDATE_DESCRIPTOR = 10
GATE = 0x0000_8E00_0000_1234
#: Where no guest can be written to: nowhere, its tables, the m2p, Xen's own, no address at all.
BAD_POINTERS = [0, 0x1000, 1 << 47, M2P, 0xFFFF_8080_0000_0000, M64, M64 - 7]

pytestmark = pytest.mark.usefixtures("asking")


# -- the guest's memory ---


@pytest.mark.parametrize("pointer", BAD_POINTERS)
def test_bad_pointers(guest, pointer):
    """Every hypercall that reads or writes a structure answers -EFAULT to a bad pointer, and
    changes nothing in memory."""
    before = guest.machine.map[:]
    for number, arguments in (
        (0, (pointer or 8,)),
        (2, (pointer, 512)),
        (12, (9, pointer)),
        (12, (12, pointer)),
        (12, (1, pointer)),
        (13, (pointer, 1)),
        (17, (1, pointer)),
        (17, (6, pointer)),
        (24, (8, 0, pointer)),
        (24, (10, 0, pointer)),
        (29, (2, pointer)),
        (29, (3, pointer)),
        (30, (0, pointer)),
        (32, (1, pointer)),
        (32, (4, pointer)),
        (33, (6, pointer)),
    ):
        # Reading the m2p is the guest's right: there the structure is merely senseless.
        expected = {FAULT, REFUSED, UNKNOWN, 0} if pointer == M2P else {FAULT}
        assert call(guest, number, *arguments) in expected, number
    assert guest.machine.map[:] == before


@pytest.mark.parametrize("page", ["m2p", "table"])
def test_copies_to_read_only_memory(guest, page):
    """An answer is not written where the guest itself could not write: the m2p, a page table."""
    pointer = M2P + 8 * guest.frames[5] if page == "m2p" else guest.va(guest.nr, 8 * 400)
    before = guest.machine.map[:]
    for number, arguments in (
        (17, (1, pointer)),
        (17, (3, pointer)),
        (12, (12, pointer)),
    ):
        assert call(guest, number, *arguments) == FAULT
    for number in (1, 26):  # the count of those done is told if it can be
        assert call(guest, number, guest.va(ARGS), 0, pointer, 0x7FF0) == 0
    guest.poke(ARGS, 0, struct.pack("<IxxxxQ", 1, pointer))
    assert call(guest, 12, 9, guest.va(ARGS)) == FAULT
    guest.poke(ARGS, 0, bytes(16))
    assert guest.machine.map[:] == before


def test_structures_may_cross_pages(guest):
    """A structure that begins in one page and ends in the next is read and written whole."""
    assert call(guest, 12, 12, guest.va(ARGS, 4090)) == 0
    crossing = guest.peek(ARGS, 4090, 6) + guest.peek(OUT, 0, 18)
    assert struct.unpack("<QQQ", crossing) == (M2P, 0xFFFF_8040_0000_0000, 0x7_FFFF_FFFF)
    guest.poke(ARGS, 4090, b"across")
    guest.poke(OUT, 0, b" pages")
    assert call(guest, 18, 0, 12, guest.va(ARGS, 4090)) == 0
    assert (guest.machine.directory / "console-1.log").read_bytes() == b"across pages"


def test_absurd_lengths(guest):
    """A length beyond all reason ends where the memory does, if not at something wrong before."""
    for number in (1, 13, 26):
        guest.poke(ARGS, 0, bytes(4096))
        assert call(guest, number, guest.va(ARGS), 1 << 30, 0, 0x7FF0) < 0
    assert call(guest, 18, 0, M64, guest.va(0)) == 0  # the console takes a page of it


# -- descriptors ---


@pytest.mark.parametrize("in_use", [False, True])
def test_descriptors_are_checked(guest, in_use):
    """Code and data, as of ring 3, absent descriptors and those of type 0 are written, into a page
    in use as GDT or an ordinary one; gates and system descriptors are refused in either."""
    (gdt,) = guest.unmap(5)
    if in_use:
        assert guest.tables.get_type(gdt, PGT_SEG_DESC) == 0
    at = gdt << 12 | 40
    rings = {CODE & ~(bits << 45): CODE for bits in range(4)}
    same = (0, GATE & ~(1 << 47), 0x0000_8000_1234_5678)
    for given, written in (rings | dict(zip(same, same, strict=True))).items():
        assert guest.hv.call(UPDATE_DESCRIPTOR, at, given, 0, 0, 0) == 0
        assert guest.machine.mem[gdt, 5] == written
    for bad in (GATE, CODE & ~(1 << 44), 0x0000_8900_0000_0067, 0x0000_EC00_0000_0000):
        assert guest.hv.call(UPDATE_DESCRIPTOR, at, bad, 0, 0, 0) == REFUSED
        assert guest.machine.mem[gdt, 5] == same[-1]
    assert guest.tables.count[gdt] == in_use


def test_descriptors_go_nowhere_else(guest, foreign):
    """Page tables, foreign frames and odd addresses take no descriptor."""
    for mfn in (guest.l1, guest.l4, foreign, guest.domain._reserved_gdt, 1, 1 << 40):
        before = guest.machine.mem[:, 0].copy()
        assert guest.hv.call(UPDATE_DESCRIPTOR, mfn << 12, CODE, 0, 0, 0) == REFUSED
        assert (guest.machine.mem[:, 0] == before).all()
    assert guest.hv.call(UPDATE_DESCRIPTOR, guest.frames[5] << 12 | 4, CODE, 0, 0, 0) == REFUSED


def test_set_gdt(guest):
    """set_gdt reads its list of frames from the guest; too many entries, or a list that is not
    there, is refused."""
    five, six = guest.unmap(5, 6)
    guest.poke(ARGS, 0, struct.pack("<QQ", five, six))
    assert guest.hv.call(2, guest.va(ARGS), 1024, 0, 0, 0) == 0
    assert list(guest.vcpu.context.gdt_frames)[:2] == [five, six]
    guest.poke(ARGS, 0, struct.pack("<15Q", *[five] * 15))
    assert guest.hv.call(2, guest.va(ARGS), 14 * 512 + 1, 0, 0, 0) == REFUSED
    assert guest.hv.call(2, 0x1000, 512, 0, 0, 0) == -errno.EFAULT
    assert guest.vcpu.context.gdt_ents == 1024
    assert guest.hv.call(2, 0, 0, 0, 0, 0) == 0
    assert guest.tables.count[five] == guest.tables.count[six] == 0
    assert not any(guest.vcpu.context.gdt_frames)


# -- the vCPU's context ---


def test_the_trap_table(guest):
    """Entries up to the first without an address are taken over, as they were given; a null
    pointer clears them all."""
    entries = [(14, 0x04, 0x33, 0x1000), (3, 0x03, 0x33, 0x2000), (0, 0, 0, 0), (6, 0, 0, 0x3000)]
    packed = b"".join(struct.pack("<BBHxxxxQ", *entry) for entry in entries)
    guest.poke(ARGS, 0, packed)
    assert call(guest, 0, guest.va(ARGS)) == 0
    assert guest.vcpu.traps == {14: (0x1000, 4), 3: (0x2000, 3)}
    trap = guest.vcpu.context.trap_ctxt[14]
    assert (trap.vector, trap.flags, trap.cs, trap.address) == (14, 4, 0x33, 0x1000)
    assert call(guest, 0, 0) == 0
    assert not guest.vcpu.traps
    assert not any(bytes(guest.vcpu.context.trap_ctxt))


def test_an_endless_trap_table(guest):
    """A table without an end is read for 256 entries."""
    for page in range(3, 6):
        guest.poke(page, 0, struct.pack("<BBHxxxxQ", 9, 0, 0, 5) * 256)
    assert call(guest, 0, guest.va(ARGS)) == 0
    assert guest.vcpu.traps == {9: (5, 0)}


def test_stacks_callbacks_and_bases(guest):
    """stack_switch, set_callbacks and set_segment_base end up in the context or the CPU."""
    context = guest.vcpu.context
    assert call(guest, 3, 0xE02B, 0x1234) == 0
    assert (context.kernel_ss, context.kernel_sp) == (0xE02B, 0x1234)
    assert call(guest, 4, 1, 2, 3) == 0
    callbacks = context.event_callback_eip, context.failsafe_callback_eip
    assert (*callbacks, context.syscall_callback_eip) == (1, 2, 3)
    for which, base in ((0, 11), (1, 12), (2, 13)):
        assert call(guest, 25, which, base) == 0
    assert (guest.hv.q[FS_BASE], context.gs_base_user, guest.hv.q[GS_BASE]) == (11, 12, 13)
    assert call(guest, 25, 3, 0x2B) == 0
    assert context.gs_base_user == 0
    assert call(guest, 25, 4, 0) == REFUSED


@pytest.mark.parametrize(
    ("kind", "field", "flag"),
    [
        (0, "event_callback_eip", None),
        (1, "failsafe_callback_eip", 1 << 3),
        (2, "syscall_callback_eip", 1 << 4),
        (5, "sysenter_callback_eip", "sysenter_disables_events"),
        (7, "syscall32_callback_eip", "syscall32_disables_events"),
    ],
)
def test_callback_op(guest, kind, field, flag):
    """Each kind of callback has its place, and CALLBACKF_mask_events its flag, on and off."""
    vcpu = guest.vcpu
    for flags in (1, 0):
        guest.poke(ARGS, 0, struct.pack("<HHxxxxQ", kind, flags, 0x77 + flags))
        assert call(guest, 30, 0, guest.va(ARGS)) == 0
        record = vcpu.context if hasattr(vcpu.context, field) else vcpu.extended
        assert getattr(record, field) == 0x77 + flags
        if isinstance(flag, str):
            assert getattr(vcpu.extended, flag) == flags
        elif flag:
            assert bool(vcpu.context.flags & flag) == flags


def test_other_callbacks(guest):
    """An NMI's callback is trap 2, and the only one to be taken away again; other kinds are not
    there; an address that can be none is refused."""
    assert call(guest, 30, 2, 0) == UNKNOWN
    for kind in (0, 1, 2, 4, 5, 7):
        guest.poke(ARGS, 0, struct.pack("<HHxxxxQ", kind, 0, 1 << 47))
        assert call(guest, 30, 0, guest.va(ARGS)) == REFUSED
        assert call(guest, 30, 1, guest.va(ARGS)) == (0 if kind == 4 else REFUSED)
    for kind in (3, 6, 8, 0xFFFF):
        guest.poke(ARGS, 0, struct.pack("<HHxxxxQ", kind, 0, 1))
        assert call(guest, 30, 0, guest.va(ARGS)) == call(guest, 30, 1, guest.va(ARGS)) == UNKNOWN
    guest.poke(ARGS, 0, struct.pack("<HHxxxxQ", 4, 0, 0x77))
    assert call(guest, 30, 0, guest.va(ARGS)) == 0
    assert guest.vcpu.traps == {2: (0x77, 4)}
    assert call(guest, 30, 1, guest.va(ARGS)) == 0
    assert not guest.vcpu.traps


def test_addresses_that_can_be_none(guest):
    """What is not canonical is no callback, no handler and no segment base; what comes before it
    in a trap table counts."""
    none = 1 << 47
    assert call(guest, 4, 1, none, 3) == 0
    context = guest.vcpu.context
    callbacks = context.event_callback_eip, context.failsafe_callback_eip
    assert (*callbacks, context.syscall_callback_eip) == (1, 0, 3)
    table = struct.pack("<BBHxxxxQ", 3, 0, 0, 5) + struct.pack("<BBHxxxxQ", 4, 0, 0, none)
    guest.poke(ARGS, 0, table)
    assert call(guest, 0, guest.va(ARGS)) == REFUSED
    assert guest.vcpu.traps == {3: (5, 0)}
    for which in range(3):
        assert call(guest, 25, which, none) == REFUSED


def test_debug_registers(guest):
    """Debug registers hold what was set, but for reserved bits; 4 and 5 are 6 and 7; a breakpoint
    in Xen's memory is -EPERM, and so are those on ports; others do not exist."""
    for register in range(4):
        assert call(guest, 8, register, 0x1234 + register) == 0
        assert call(guest, 9, register) == 0x1234 + register
        for address in (0xFFFF_8000_0000_0000, 1 << 47):
            assert call(guest, 8, register, address) == -errno.EPERM
    for register, alias, value, read in (
        (6, 4, 0, 0xFFFF0FF0),
        (6, 4, 0xFFFF_FFFF, 0xFFFFEFFF),
        (7, 5, 0, 0x400),
        (7, 5, 0xDD00_DDFF, 0xDD00_05FF),
    ):
        for which in (register, alias):
            assert call(guest, 8, which, value) == 0
            assert call(guest, 9, register) == call(guest, 9, alias) == read
        assert call(guest, 8, register, 1 << 32) == REFUSED
    assert call(guest, 8, 7, 1 << 13) == -errno.EPERM
    assert call(guest, 8, 7, 2 << 16 | 1) == -errno.EPERM
    for register in (8, M64):
        assert call(guest, 8, register, 1) == call(guest, 9, register) == -errno.ENODEV


def test_vm_assists(guest):
    """Assists are switched on and off one by one; unknown ones are refused."""
    assert call(guest, 21, 0, 2) == call(guest, 21, 0, 5) == 0
    assert guest.domain.vm_assist == 1 << 2 | 1 << 5
    assert call(guest, 21, 1, 2) == 0
    assert guest.domain.vm_assist == 1 << 5
    for arguments in ((0, 6), (2, 0), (M64, 0), (0, M64)):
        assert call(guest, 21, *arguments) == REFUSED


def test_the_iopl(guest):
    """PHYSDEVOP_set_iopl keeps a level from 0 to 3; other physical devices are not there."""
    for level in (3, 1, 0):
        guest.poke(ARGS, 0, struct.pack("<I", level))
        assert call(guest, 33, 6, guest.va(ARGS)) == 0
        assert guest.vcpu.context.user_regs.rflags >> 12 & 3 == level
    guest.poke(ARGS, 0, struct.pack("<I", 4))
    assert call(guest, 33, 6, guest.va(ARGS)) == REFUSED
    assert call(guest, 33, 7, 0) == 0
    assert call(guest, 33, 10, 0) == UNKNOWN


# -- Xen itself ---


def test_the_version_is_no_hosts(guest):
    """Version, capabilities and features are Xen's constants; what is not known is -ENOSYS."""
    out = guest.va(OUT)
    assert call(guest, 17, 0) == 4 << 16 | 17
    assert call(guest, 17, 7) == 4096
    assert call(guest, 17, 3, out) == 0
    assert guest.peek(OUT, 0, 1024).rstrip(b"\0") == b"xen-3.0-x86_64 "
    assert call(guest, 17, 5, out) == 0
    assert guest.peek(OUT, 0, 8) == struct.pack("<Q", M2P)
    for index, features in ((0, 0xF0), (1, 0), (1 << 31, 0)):
        guest.poke(OUT, 0, struct.pack("<II", index, 99))
        assert call(guest, 17, 6, out) == 0
        assert guest.peek(OUT, 4, 4) == struct.pack("<I", features)
    assert call(guest, 17, 11, out) == UNKNOWN


def test_the_emergency_console(guest):
    """console_io writes to the log, a page at most; reading is not there."""
    guest.poke(ARGS, 0, b"x" * 4096)
    assert call(guest, 18, 0, 5, guest.va(ARGS)) == 0
    assert call(guest, 18, 0, 0, 0) == 0
    assert call(guest, 18, 0, 1 << 40, guest.va(ARGS)) == 0
    assert (guest.machine.directory / "console-1.log").read_bytes() == b"x" * 4101
    assert call(guest, 18, 1, 5, guest.va(ARGS)) == UNKNOWN


def test_unknown_hypercalls(guest):
    """A number without a hypercall is -ENOSYS; its upper half does not count."""
    assert call(guest, 20) == call(guest, 63) == call(guest, M64) == UNKNOWN
    assert call(guest, 17 | 5 << 32, 7) == 4096


def entry(number, *arguments):
    return struct.pack("<8Q", number, 0x55, *arguments, *[0] * (6 - len(arguments)))


def results(guest, nr):
    return [struct.unpack("<q", guest.peek(ARGS, 64 * i + 8, 8))[0] for i in range(nr)]


def test_multicall(guest):
    """Each call's result is put into its entry; one that fails does not end the batch, one inside
    another is refused, and results of all 64 bits fit."""
    call(guest, 8, 0, M64)
    guest.poke(ARGS, 0, entry(17, 7) + entry(20) + entry(13, 0, 0) + entry(9, 0) + entry(17, 3, 8))
    assert call(guest, 13, guest.va(ARGS), 5) == 0
    assert results(guest, 5) == [4096, UNKNOWN, UNKNOWN, -1, FAULT]


def test_a_multicall_ends_with_the_domain(guest):
    """After a shutdown no further call of the batch is made."""
    guest.poke(OUT, 0, struct.pack("<I", 0))
    guest.poke(ARGS, 0, entry(29, 2, guest.va(OUT)) + entry(17, 7))
    assert call(guest, 13, guest.va(ARGS), 2) == 0
    assert results(guest, 2) == [0, 0x55]
