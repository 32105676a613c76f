"""User space of a guest: what it may do, and how its kernel hears of the rest."""

from __future__ import annotations

import struct

import pytest

from tests.guest.rig import FULL
from xsave.guest.xen import cpuregs
from xsave.guest.xen.cpuregs import RAX, RBX, RSP


class Process:
    """User space of a guest: its code in page 7 and its stack in page 8, mapped by tables of its
    own in which nothing else is."""

    def __init__(self, guest):
        self.guest = guest
        tables, machine = guest.tables, guest.machine
        self.l4, self.l3, self.l2, self.l1 = (int(m) for m in machine.allocate(1, 4))
        for page in (7, 8):
            machine.mem[self.l1, page] = guest.frames[page] << 12 | FULL
        for table, slot, target in ((self.l2, 2, self.l1), (self.l3, 0, self.l2),
                                    (self.l4, 0, self.l3)):  # fmt: skip
            machine.mem[table, slot] = target << 12 | FULL
        assert tables.pin(self.l4, 4) == 0
        guest.power_on()
        guest.poke(3, 0, struct.pack("<IIQQ", 15, 0, self.l4, 0))  # MMUEXT_NEW_USER_BASEPTR
        guest.run(b"\xb8\x1a\x00\x00\x00\x0f\x05", rdi=guest.va(3), rsi=1, rdx=0, r10=0x7FF0)
        guest.hv.q[cpuregs.GS_BASE] = 0x1111
        guest.vcpu.context.gs_base_user = 0x2222

    def run(self, code, *, cs=0xE033, flags=0x202, rax=0, **registers):
        """Enter user space at this code by HYPERVISOR_iret; return where the run stopped."""
        guest = self.guest
        guest.poke(7, 0, code)
        guest.hv.cpu.forget_code()
        frame = [rax, 0, 0, 0, guest.va(7), cs, flags, guest.va(9), 0xE02B]
        guest.poke(1, 1024, struct.pack("<9Q", *frame))
        return guest.run(b"\x0f\x05", rax=23, rsp=guest.va(1, 1024), **registers)


@pytest.fixture
def process(guest):
    """A guest with user space and handlers for whatever that does."""
    for vector in (6, 8, 13, 14):
        guest.set_handler(vector)
    guest.syscall = guest.va(6)
    guest.poke(6, 0, b"\x0f\x05")
    guest.stops.add(guest.syscall)
    guest.vcpu.context.syscall_callback_eip = guest.syscall
    return Process(guest)


def handler(guest, vector):
    return guest.vcpu.traps[vector][0]


def test_user_space_runs_on_its_own_tables(process):
    """iret with a ring-3 cs leaves the kernel: the user's page tables and GS base are in force,
    a syscall comes back with both exchanged, on the kernel's stack."""
    guest = process.guest
    push = b"\x65\x48\x8b\x04\x25\xde\xdd\xff\xff"  # mov rax, gs:[-0x2222]: address 0
    assert process.run(b"\x90" + b"\x0f\x05", rbx=5) == guest.syscall
    assert guest.vcpu.in_kernel
    assert guest.hv.q[cpuregs.GS_BASE] == 0x1111
    assert guest.vcpu.context.gs_base_user == 0x2222
    rcx, r11, rip, cs, flags, rsp, ss = guest.stacked(7)
    assert (rip, rsp, ss, cs) == (guest.va(7, 3), guest.va(9), 0xE02B, 0xE033)
    assert (rcx, r11) == (guest.va(7, 3), flags) == (rip, 0x202)
    assert guest.hv.q[RSP] == guest.vcpu.context.kernel_sp - 56
    assert guest.hv.q[RBX] == 5
    assert process.run(push) == handler(guest, 14)
    assert guest.vcpu.info.cr2 == 0


def test_a_syscall_with_prefixes(process):
    """The kernel is entered at its callback, and told to go on behind the whole instruction."""
    guest = process.guest
    assert process.run(b"\x66\x48\x0f\x05") == guest.syscall
    assert guest.stacked(3)[2] == guest.hv.q[cpuregs.RCX] == guest.va(7, 4)


def test_a_syscall_is_no_hypercall(process):
    """In user space the syscall instruction reaches the guest's kernel, whatever is in rax."""
    guest = process.guest
    guest.hv.call = None
    code = b"\xb8\x17\x00\x00\x00\x0f\x05"
    assert process.run(code) == guest.syscall
    assert guest.hv.q[RAX] == 23


def test_a_syscall_without_a_callback(process):
    """A kernel that let user space run and has no callback for its system calls is crashed."""
    guest = process.guest
    guest.vcpu.context.syscall_callback_eip = 0
    assert process.run(b"\x0f\x05") == -1
    assert guest.domain.shutdown_reason == 3
    assert "no callback" in guest.domain.crash_message


@pytest.mark.parametrize("disables", [0, 16])
def test_a_syscall_masks_upcalls_if_asked(process, disables):
    """VGCF_syscall_disables_events decides whether the callback is entered with upcalls masked."""
    guest = process.guest
    guest.vcpu.context.flags = guest.vcpu.context.flags & ~16 | disables
    process.run(b"\x0f\x05")
    assert guest.vcpu.info.evtchn_upcall_mask == bool(disables)


def test_user_space_sees_none_of_its_kernel(process):
    """What only the kernel's tables map faults in user space, as a user's fault."""
    guest = process.guest
    for code, error in ((b"\x48\x8b\x07", 4), (b"\x48\x89\x07", 6)):
        assert process.run(code, rdi=guest.va(3)) == handler(guest, 14)
        _, _, found, rip, cs = guest.stacked(5)
        assert (found, rip, cs & 3) == (error, guest.va(7), 3)
        assert guest.vcpu.info.cr2 == guest.va(3)
        assert guest.vcpu.in_kernel


@pytest.mark.parametrize(
    "code", [b"\x0f\x32", b"\x0f\x30", b"\xf4", b"\xfa", b"\x0f\x20\xd8", b"\x0f\x06"]
)
def test_user_space_has_no_privileges(process, code):
    """A privileged instruction in user space is not emulated: its kernel gets the fault."""
    assert process.run(code, rcx=0xC0000100) == handler(process.guest, 13)
    assert process.guest.stacked(4)[3] == process.guest.va(7)


@pytest.mark.parametrize("vector", [2, 8, 13, 14, 0x20, 0x81])
def test_user_space_cannot_feign_exceptions(process, vector):
    """`int n` through a gate that is not open to user space is a protection fault that names the
    gate, at the instruction; through an open one it is taken, without an error code."""
    guest = process.guest
    if vector not in guest.vcpu.traps:
        guest.set_handler(vector, 0)
    assert process.run(bytes([0xCD, vector])) == handler(guest, 13)
    _, _, error, rip = guest.stacked(4)
    assert (error, rip) == (vector << 3 | 2, guest.va(7))
    opened = guest.set_handler(vector, 3)
    assert process.run(bytes([0xCD, vector])) == opened
    assert guest.stacked(3)[2] == guest.va(7, 2)


def test_int3_is_open_to_all(process):
    """A breakpoint in user space reaches the kernel's handler, behind the instruction."""
    guest = process.guest
    breakpoint_ = guest.set_handler(3)
    assert process.run(b"\xcc") == breakpoint_
    assert guest.stacked(3)[2] == guest.va(7, 1)


def test_a_stale_user_table_is_not_kept(process):
    """NEW_USER_BASEPTR with 0 gives the old tables back; returning to user space then is a crash
    of the domain, and so is returning from no frame."""
    guest = process.guest
    assert guest.tables.count[process.l4] == 2
    guest.poke(3, 0, struct.pack("<IIQQ", 15, 0, 0, 0))
    guest.run(b"\xb8\x1a\x00\x00\x00\x0f\x05", rdi=guest.va(3), rsi=1, rdx=0, r10=0x7FF0)
    assert guest.tables.count[process.l4] == 1
    assert process.run(b"\x90") == -1
    assert "without a user page table" in guest.domain.crash_message


def test_iret_without_a_frame_crashes(guest):
    """HYPERVISOR_iret with a stack that is not mapped crashes the domain."""
    assert guest.run(b"\x0f\x05", rax=23, rsp=0x1000) == -1
    assert "no iret frame" in guest.domain.crash_message


# ---- 32-bit code

CS32 = 0xE023
#: In 32-bit code `dec eax; syscall`, in 64-bit code a syscall with a prefix.
DEC_SYSCALL = b"\x48\x0f\x05"


@pytest.mark.parametrize("disables", [0, 1])
def test_32_bit_code_and_its_syscall(process, disables):
    """iret to a 32-bit code segment runs 32-bit code; its syscall has a callback of its own, which
    is 64-bit code again, and so is the user space that is entered next."""
    guest = process.guest
    callback = guest.set_handler(32)
    guest.vcpu.extended.syscall32_callback_eip = callback
    guest.vcpu.extended.syscall32_disables_events = disables
    assert process.run(DEC_SYSCALL, cs=CS32, rax=5) == callback
    assert guest.hv.q[RAX] == 4
    assert guest.vcpu.in_kernel
    assert guest.vcpu.info.evtchn_upcall_mask == disables
    rcx, _, rip, cs, _, rsp, _ = guest.stacked(7)
    assert (rcx, rip, cs & 0xFFFF, rsp) == (guest.va(7, 3), guest.va(7, 3), CS32, guest.va(9))
    assert guest.run(b"\x48\xff\xc8", rax=0) == guest.va(0, 3)
    assert guest.hv.q[RAX] == (1 << 64) - 1  # dec rax, not dec eax; dec eax
    assert process.run(DEC_SYSCALL, rax=5) == guest.syscall
    assert guest.hv.q[RAX] == 5


def test_a_syscall_without_a_32_bit_callback(process):
    """It takes the other one."""
    assert process.run(DEC_SYSCALL, cs=CS32, rax=5) == process.guest.syscall
    assert process.guest.hv.q[RAX] == 4


def test_exceptions_of_32_bit_code(process):
    """A fault, and a gate that is open to user space: the frame says where, in which segment."""
    guest = process.guest
    assert process.run(b"\x48\x8b\x07", cs=CS32, rdi=guest.va(3)) == handler(guest, 14)
    _, _, error, rip, cs = guest.stacked(5)
    assert (error, rip, cs & 0xFFFF) == (4, guest.va(7, 1), CS32)
    assert guest.vcpu.info.cr2 == guest.va(3)
    gate = guest.set_handler(0x80, 3)
    assert process.run(b"\x48\xcd\x80", cs=CS32, rax=21) == gate
    assert guest.hv.q[RAX] == 20
    assert guest.stacked(3)[2] == guest.va(7, 3)


def test_sysenter(process):
    """It says nothing of where it came from: null segment, rip and stack; without a callback it is
    a protection fault at the instruction."""
    guest = process.guest
    assert process.run(b"\x48\x0f\x34", cs=CS32) == handler(guest, 13)
    _, _, error, rip = guest.stacked(4)
    assert (error, rip) == (0, guest.va(7, 1))
    callback = guest.set_handler(33)
    guest.vcpu.extended.sysenter_callback_eip = callback
    guest.vcpu.extended.sysenter_disables_events = 1
    assert process.run(b"\x48\x0f\x34", cs=CS32, rbp=0x1234) == callback
    _, _, rip, cs, _, rsp, ss = guest.stacked(7)
    assert (rip, cs & 0xFFFF, rsp, ss) == (0, 3, 0, 0xE02B)
    assert guest.vcpu.info.evtchn_upcall_mask == 1
    assert guest.hv.q[cpuregs.RBP] == 0x1234


def test_segments_of_the_guest(process):
    """Code segments are what the guest's own GDT says, and a GS that its kernel loads for user
    space has the base that is there; one that is not there is null."""
    guest = process.guest
    (gdt,) = guest.unmap(9)
    code32, data = 0x00CFFB000000FFFF, 0x00CFF3000000FFFF | guest.va(8) << 16 & 0xFFFFFF0000
    guest.poke(9, 8 * 4, struct.pack("<QQ", code32, data))
    guest.poke(8, 0, b"abcd")
    assert guest.domain.set_gdt(guest.vcpu, [gdt], 16) == 0
    load_gs = b"\xb8\x19\x00\x00\x00\x0f\x05"
    assert guest.run(load_gs, rdi=3, rsi=5 << 3 | 3) == guest.va(0, len(load_gs))
    assert guest.hv.q[cpuregs.GS_BASE] == 0x1111
    assert process.run(b"\x65\xa1\0\0\0\0" + DEC_SYSCALL, cs=0x23) == guest.syscall
    assert guest.hv.q[RAX] == int.from_bytes(b"abcd", "little") - 1
    assert guest.vcpu.context.gs_base_user == guest.va(8)
    for selector in (6 << 3 | 3, 5 << 3 | 7, 0xFFFB):
        guest.run(load_gs, rdi=3, rsi=selector)
        assert guest.hv.q[cpuregs.GS_SEL] & 0xFFFF == 0
        assert guest.vcpu.context.gs_base_user == 0


def test_a_single_step(process):
    """TF in the flags of user space: the exception behind its first instruction, and DR6 says why;
    an event that comes first is taken before that instruction, with TF in its frame."""
    guest = process.guest
    debug = guest.set_handler(1)
    for _ in range(3):
        assert process.run(b"\x90\x90", flags=0x302) == debug
        assert guest.stacked(3)[2] == guest.va(7, 1)
        assert guest.vcpu.context.debugreg[6] == 0xFFFF4FF0
    guest.vcpu.context.event_callback_eip = guest.set_handler(34)
    guest.vcpu.info.evtchn_upcall_pending = 1
    guest.vcpu.info.evtchn_upcall_mask = 1  # until the iret
    assert process.run(b"\x90\x90", flags=0x302) == guest.vcpu.context.event_callback_eip
    _, _, rip, _, flags = guest.stacked(5)
    assert (rip, flags & 0x100) == (guest.va(7), 0x100)
