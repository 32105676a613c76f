"""Privileged instructions of a guest kernel, executed on the CPU it has."""

from __future__ import annotations

import struct

import pytest

from tests.guest.rig import Guest
from tests.guest.test_cpufeatures import LEAF1, policy
from xsave.guest.xen import cpuregs
from xsave.guest.xen.context import xsave_fault
from xsave.guest.xen.cpuregs import FS_BASE, GS_BASE, RAX, RDX, RIP
from xsave.guest.xen.privop import emulate_privileged, fetch

M64 = (1 << 64) - 1
RDMSR, WRMSR, XSETBV = b"\x0f\x32", b"\x0f\x30", b"\x0f\x01\xd1"
MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE = 0xC0000100, 0xC0000101, 0xC0000102
LOW = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"]
REGISTERS = [*LOW, *(f"r{i}" for i in range(8, 16))]


@pytest.fixture
def kernel(guest):
    """A guest kernel with a handler for protection faults, that was promised XSAVE."""
    guest.domain.policy = policy([(LEAF1, 26)])
    guest.gp = guest.set_handler(13)
    guest.power_on()
    return guest


def done(guest, code, **registers):
    """Run an instruction that must be emulated, to its last byte."""
    assert guest.run(code, **registers) == guest.va(0, len(code))


def registers_of(guest, *but):
    skipped = {getattr(cpuregs, name) for name in but}
    return [guest.hv.q[i] for i in range(16) if i not in skipped]


@pytest.mark.parametrize(
    "code",
    [b"\xfa", b"\xfb", b"\xf4", b"\x0f\x06", b"\x0f\x08", b"\x0f\x09"],
    ids=["cli", "sti", "hlt", "clts", "invd", "wbinvd"],
)
def test_no_ops(kernel, code):
    """What has no meaning under Xen does nothing: no register, flag or upcall mask changes."""
    before = registers_of(kernel)
    flags, mask = kernel.hv.cpu.rflags, kernel.vcpu.info.evtchn_upcall_mask
    done(kernel, code)
    assert registers_of(kernel) == before
    assert (kernel.hv.cpu.rflags, kernel.vcpu.info.evtchn_upcall_mask) == (flags, mask)


# -- MSRs ---


@pytest.mark.parametrize("value", [0, 0x1234_5678_9ABC_DEF0, M64])
def test_segment_base_msrs(kernel, value):
    """FS_BASE and GS_BASE are the live bases, KERNEL_GS_BASE is the one of user space; what was
    written is read back, whatever is in the upper halves of the registers."""
    low, high = value & 0xFFFFFFFF | 0xAA << 32, value >> 32 | 0xBB << 32
    for msr in (MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE):
        done(kernel, WRMSR, rcx=msr | 0xCC << 32, rax=low, rdx=high)
        done(kernel, RDMSR, rcx=msr | 0xDD << 32, rax=M64, rdx=M64)
        assert (kernel.hv.q[RAX], kernel.hv.q[RDX]) == (value & 0xFFFFFFFF, value >> 32)
    assert kernel.hv.q[FS_BASE] == kernel.hv.q[GS_BASE] == value
    assert kernel.vcpu.context.gs_base_user == value
    assert kernel.vcpu.context.gs_base_kernel == 0


@pytest.mark.parametrize(
    ("msr", "value"),
    [(0xC0000080, 0xD01), (0x277, 0x0007010600070106), (0x1B, 0xFEE00900), (0x10A, 0), (5, 0)],
)
def test_other_msrs_are_what_they_are(kernel, msr, value):
    """EFER, PAT and the APIC base have Xen's values, all others are zero; writes are ignored."""
    for _ in range(2):
        done(kernel, RDMSR, rcx=msr, rax=M64, rdx=M64)
        assert kernel.hv.q[RDX] << 32 | kernel.hv.q[RAX] == value
        bases = kernel.hv.q[FS_BASE], kernel.hv.q[GS_BASE]
        done(kernel, WRMSR, rcx=msr, rax=0x55, rdx=0x66)
        assert (kernel.hv.q[FS_BASE], kernel.hv.q[GS_BASE]) == bases


# -- control and debug registers ---


def move(op, number, register):
    """mov between control (0x20, 0x22) or debug (0x21, 0x23) register and a general one."""
    rex = 0x40 | (number >> 3) << 2 | register >> 3
    prefix = bytes([rex]) if rex != 0x40 else b""
    return prefix + bytes([0x0F, op, 0xC0 | (number & 7) << 3 | register & 7])


@pytest.mark.parametrize("register", range(16))
def test_control_registers_are_read(kernel, register):
    """cr0, cr2, cr3, cr4 and cr8 come into any general register; no other changes."""
    context = kernel.vcpu.context
    context.ctrlreg[2] = 0xDEAD000
    expected = {
        0: context.ctrlreg[0],
        2: 0xDEAD000,
        3: kernel.vcpu.cr3,
        4: context.ctrlreg[4],
        8: 0,
    }
    name = REGISTERS[register].upper()
    before = registers_of(kernel, name)
    for number, value in expected.items():
        done(kernel, move(0x20, number, register))
        assert kernel.hv.q[register] == value
        assert registers_of(kernel, name) == before


def test_cr4_takes_what_a_guest_may_have(kernel):
    """Of cr4 the guest sets FSGSBASE and OSXSAVE; the rest stays, and cpuid follows."""
    done(kernel, move(0x22, 4, 0), rax=M64)
    assert kernel.vcpu.context.ctrlreg[4] == 0x660 | 1 << 16 | 1 << 18
    done(kernel, b"\x0f\xa2", rax=1, rcx=0)
    assert kernel.hv.q[cpuregs.RCX] >> 27 & 1
    done(kernel, move(0x22, 4, 9), r9=0)
    assert kernel.vcpu.context.ctrlreg[4] == 0x660


@pytest.mark.parametrize("number", [0, 2, 3, 8])
def test_other_control_registers_stay(kernel, number):
    """Writing cr0, cr2, cr3 or cr8 changes nothing: page tables change by hypercall only."""
    before = bytes(kernel.vcpu.context)
    done(kernel, move(0x22, number, 0), rax=M64)
    assert bytes(kernel.vcpu.context) == before
    assert kernel.vcpu.cr3 == kernel.l4 << 12


@pytest.mark.parametrize("number", [0, 1, 2, 3, 6, 7])
@pytest.mark.parametrize("register", [0, 3, 4, 12])
def test_debug_registers_hold_what_was_written(kernel, number, register):
    """A debug register keeps its value in the context and gives it back; it is never armed."""
    name = REGISTERS[register]
    done(kernel, move(0x23, number, register), **{name: 0xABC0 + number})
    assert kernel.vcpu.context.debugreg[number] == 0xABC0 + number
    done(kernel, move(0x21, number, register), **{name: 0})
    assert kernel.hv.q[register] == 0xABC0 + number


# -- XSETBV ---


@pytest.mark.parametrize(
    ("value", "accum", "index", "accepted"),
    [
        (3, 7, 0, True),
        (7, 7, 0, True),
        (1, 7, 0, True),
        (7, 3, 0, False),  # more than its state has room for
        (2, 7, 0, False),  # x87 is always on
        (5, 7, 0, False),  # AVX needs SSE
        (0xE7, 0xE7, 0, False),
        (3, 7, 1, False),
        (1 << 32 | 3, 7, 0, False),
    ],
)
def test_xsetbv(kernel, value, accum, index, accepted):
    """A guest with XSAVE state enables what that state has room for; anything else faults and
    changes nothing."""
    record = struct.pack("<QQ", 1, accum) + bytes(512) + struct.pack("<Q", 1) + bytes(56)
    kernel.vcpu.xsave = record
    stopped = kernel.run(XSETBV, rcx=index, rax=value & 0xFFFFFFFF, rdx=value >> 32)
    assert (stopped != kernel.gp) == accepted
    assert kernel.vcpu.xsave[:8] == struct.pack("<Q", value if accepted else 1)
    assert kernel.vcpu.xsave[8:] == record[8:]
    assert xsave_fault(kernel.vcpu.xsave) == ""


def test_xsetbv_without_state(kernel):
    """A guest that has no XSAVE state cannot enable any."""
    for record in (b"", bytes(16)):
        kernel.vcpu.xsave = record
        assert kernel.run(XSETBV, rcx=0, rax=1, rdx=0) == kernel.gp
        assert kernel.vcpu.xsave == record


# -- ports ---


@pytest.mark.parametrize(
    ("code", "ones"),
    [(b"\xe4\x60", 0xFF), (b"\xec", 0xFF), (b"\x66\xed", 0xFFFF), (b"\xed", 0xFFFFFFFF)],
)
def test_no_port_has_a_device(kernel, code, ones):
    """Reading a port gives all ones in as many bytes as were asked for, writing does nothing."""
    done(kernel, code, rax=0x1111111111111111, rdx=0x3F8)
    kept = 0 if ones == 0xFFFFFFFF else 0x1111111111111111 & ~ones
    assert kernel.hv.q[RAX] == kept | ones
    done(kernel, bytes([*code[:-1], code[-1]]).replace(b"\xec", b"\xee").replace(b"\xed", b"\xef"))


def test_the_timer_chip_stands_still(kernel):
    """Counter 2, by which Linux calibrates its clock, reads 0 and not all ones, which would be a
    count about to change."""
    done(kernel, b"\xe4\x42", rax=0x11)  # in al, 0x42
    assert kernel.hv.q[RAX] == 0


# -- what is not ours ---


@pytest.mark.parametrize(
    "code", [b"\x8e\xd8", b"\x0f\x01\x1f", b"\x0f\x00\xd8", b"\x0f\x07", b"\xa1" + b"\x80" * 8]
)
def test_other_faults_are_the_guests(kernel, code):
    """A protection fault of anything else reaches the guest, at that instruction, with nothing
    changed."""
    before = registers_of(kernel, "RSP", "RAX", "RDI")
    kernel.run(code, rax=0xFFF8, rdi=kernel.va(3), rsp=kernel.va(2))
    assert kernel.hv.stopped_at == kernel.gp
    assert kernel.stacked(4)[3] == kernel.va(0)
    assert registers_of(kernel, "RSP", "RAX", "RDI") == before


@pytest.mark.parametrize("code", [b"\xf4", b"\x0f\x09", b"\x41\x0f\x20\xc0"])
def test_the_instruction_may_end_the_last_page(machines, code):
    """An instruction is decoded at the very end of the mapped pages; bytes that are not there
    are never asked for."""
    guest = Guest(machines.make(), nr=8)
    guest.power_on()
    for slot in range(8, 12):
        guest.tables.update_entry(guest.l1, slot, 0)
    guest.poke(7, 4096 - len(code), code)
    guest.hv.q[RIP] = guest.va(7, 4096 - len(code))
    assert emulate_privileged(guest.hv, fetch(guest.hv))
    assert guest.hv.q[RIP] == guest.va(8)


def test_code_that_is_not_there(kernel):
    """Nothing is emulated where rip is not mapped, or where only half an instruction is."""
    for slot in range(kernel.nr, kernel.nr + 4):
        kernel.tables.update_entry(kernel.l1, slot, 0)
    kernel.poke(kernel.nr - 1, 4095, b"\x0f")
    for rip in (0, kernel.va(kernel.nr - 1, 4095), 1 << 47):
        kernel.hv.q[RIP] = rip
        assert not emulate_privileged(kernel.hv, fetch(kernel.hv))
        assert kernel.hv.q[RIP] == rip
