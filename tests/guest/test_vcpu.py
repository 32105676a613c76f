"""The emulated CPU: high frames, registers and FPU state kept, exceptions where they belong."""

from __future__ import annotations

import ctypes
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.rig import MIB, Guest, remove
from xsave.guest.xen import cpuregs
from xsave.guest.xen.context import RFLAGS_IF, Vcpu, xsave_fault
from xsave.guest.xen.cpuregs import RBX
from xsave.guest.xen.vcpu import FLAT_RING3_CS64, FLAT_RING3_SS64, EmulatorFault
from xsave.public import VGCF_IN_KERNEL, VcpuGuestContext

GENERAL = [f"r{n}" for n in ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp", *range(8, 16))]
RFLAGS_FREE = 0x8D5 | 0x400 | 0x200000  # arithmetic, direction, ID
FXSAVE, FXRSTOR = b"\x48\x0f\xae\x07", b"\x48\x0f\xae\x0f"  # [rdi]


# -- frames above 4 GiB ---


@pytest.fixture
def high(machines):
    """A guest all of whose frames, page tables too, lie above 4 GiB."""
    machine = machines.make(4096 * MIB + 64 * MIB)
    rng = random.Random(1)
    frames = np.array(rng.sample(range(1 << 20, machine.nr_frames), 20), np.uint64)
    machine.owner[frames] = 1
    return Guest(machine, frames=frames)


def test_cr3_and_frames_above_4_gib(high):
    """The CPU walks tables, fetches, reads and writes above 4 GiB of machine memory, after a
    reload of cr3 as well."""
    assert high.vcpu.cr3 > 1 << 32
    high.poke(3, 8, struct.pack("<Q", 0x1122334455667788))
    code = b"\x48\x8b\x07\x48\x89\x06"  # mov rax, [rdi]; mov [rsi], rax
    for page in (4, 5):
        stopped = high.run(code, rdi=high.va(3, 8), rsi=high.va(page, 16))
        assert stopped == high.va(0, len(code))
        assert high.peek(page, 16, 8) == high.peek(3, 8, 8)
        high.hv.cpu.load_cr3(high.vcpu.cr3)


def test_a_low_frame_of_the_same_number_is_not_touched(high):
    """Nothing is cut to 32 bits on the way: the frames 4 GiB below stay empty."""
    high.run(b"\x48\x89\x37", rdi=high.va(3), rsi=0xABC)
    low = np.array(high.frames) - (1 << 20)
    low = low[low >= high.machine.first_frame]
    assert not high.machine.resident(low).any()
    assert low.size


# -- registers ---


@st.composite
def contexts(draw):
    """User registers and bases of a vCPU in its kernel."""
    values = {name: draw(st.integers(0, (1 << 64) - 1)) for name in GENERAL}
    values["rip"] = draw(st.integers(0, (1 << 47) - 1))
    values["rflags"] = draw(st.integers(0, (1 << 64) - 1)) & (RFLAGS_FREE | 3 << 12) | RFLAGS_IF | 2
    bases = {name: draw(st.integers(0, (1 << 64) - 1)) for name in
             ("fs_base", "gs_base_kernel", "gs_base_user")}  # fmt: skip
    selectors = {
        name: draw(st.sampled_from([0, 0x10, 0xE02B])) for name in ("ds", "es", "fs", "gs")
    }
    return values | selectors, bases


@settings(max_examples=12)
@given(contexts())
def test_registers_come_back_as_they_went(module_machine, wanted):
    """What is loaded into the CPU is read back: registers, flags with the IOPL the CPU does not
    hold, selectors and segment bases."""
    guest = Guest(module_machine)
    try:
        registers, bases = wanted
        context = guest.vcpu.context
        for name, value in registers.items():
            setattr(context.user_regs, name, value)
        for name, value in bases.items():
            setattr(context, name, value)
        before = bytes(context)
        guest.hv.power_on()
        for name in GENERAL:
            setattr(context.user_regs, name, 0)
        guest.vcpu.read_registers(guest.hv.cpu)
        assert bytes(context) == before
    finally:
        remove(guest.domain)


def test_the_guest_runs_with_what_was_loaded(guest):
    """The registers are the CPU's own: code sees them, and what code changes is read back."""
    guest.power_on()
    q = guest.hv.q
    q[cpuregs.FS_BASE] = guest.va(3)
    # mov rax, fs:[8]; pushfq; pop rbx; lea r15, [r15 + 1]
    code = b"\x64\x48\x8b\x04\x25\x08\x00\x00\x00\x9c\x5b\x4d\x8d\x7f\x01"
    guest.poke(3, 8, struct.pack("<Q", 0x77))
    guest.run(code, r15=41)
    guest.vcpu.read_registers(guest.hv.cpu)
    regs = guest.vcpu.context.user_regs
    assert (regs.rax, regs.r15) == (0x77, 42)
    assert regs.rbx & RFLAGS_IF
    assert guest.vcpu.context.fs_base == guest.va(3)
    assert (regs.cs, regs.ss) == (FLAT_RING3_CS64, FLAT_RING3_SS64)


@pytest.mark.parametrize("iopl", range(4))
def test_the_iopl_is_kept_aside(guest, iopl):
    """The guest's IOPL is in its context and its flags, never in the CPU's own."""
    guest.vcpu.iopl = iopl
    guest.run(b"\x9c\x5b")
    assert guest.hv.q[RBX] & 0x3000 == 0
    guest.vcpu.read_registers(guest.hv.cpu)
    assert guest.vcpu.iopl == iopl << 12


def test_the_mode_decides_which_gs_is_live(guest):
    """In the kernel the live GS base is the kernel's; a vCPU read outside is marked so."""
    guest.power_on()
    context = guest.vcpu.context
    guest.hv.q[cpuregs.GS_BASE] = 0x1000
    guest.vcpu.read_registers(guest.hv.cpu)
    assert (context.gs_base_kernel, context.gs_base_user) == (0x1000, 0)
    assert context.flags & VGCF_IN_KERNEL
    guest.vcpu.in_kernel = False
    guest.hv.q[cpuregs.GS_BASE] = 0x2000
    guest.vcpu.read_registers(guest.hv.cpu)
    assert (context.gs_base_kernel, context.gs_base_user) == (0x1000, 0x2000)
    assert not context.flags & VGCF_IN_KERNEL


def test_a_whole_context_is_taken(guest):
    """load_context() takes the record's bytes: traps, mode and registers are those of it."""
    source = Vcpu(0, guest.vcpu.info)
    source.set_trap(14, 4, 0x33, 0x1234)
    source.set_trap(3, 3, 0x33, 0x99)
    source.context.user_regs.r9 = 5
    vcpu = Vcpu(1, guest.vcpu.info)
    vcpu.load_context(bytes(source.context))
    assert vcpu.traps == {14: (0x1234, 4), 3: (0x99, 3)}
    assert vcpu.context.user_regs.r9 == 5
    assert vcpu.in_kernel
    vcpu.set_trap(3, 0, 0, 0)
    assert 3 not in vcpu.traps
    vcpu.clear_traps()
    assert not vcpu.traps
    assert not any(bytes(vcpu.context.trap_ctxt))
    user = VcpuGuestContext.from_buffer_copy(bytes(source.context))
    user.flags &= ~VGCF_IN_KERNEL
    vcpu.load_context(bytes(user))
    assert not vcpu.in_kernel


# -- FPU and SSE ---

#: Each leaves the x87 stack at another depth: fldpi; fld1; fldl2e; fldz; fldlg2 ...
PUSHES = [b"\xd9\xeb", b"\xd9\xe8", b"\xd9\xea", b"\xd9\xee", b"\xd9\xec", b"\xd9\xed", b"\xd9\xe9"]


def fill_sse(guest):
    """Load xmm0-15 and MXCSR with values of their own, and the x87 control word."""
    guest.poke(3, 0, bytes(range(256)))
    guest.poke(3, 256, struct.pack("<IH", 0x1FA0, 0x27F))
    code = b"".join(
        bytes([0xF3, 0x44 if i > 7 else 0x40, 0x0F, 0x6F, 0x87 | (i & 7) << 3])
        + struct.pack("<i", 16 * i)
        for i in range(16)
    )
    code += b"\x0f\xae\x97" + struct.pack("<i", 256) + b"\xd9\xaf" + struct.pack("<i", 260)
    guest.run(code, rdi=guest.va(3))


def fxsave_by_the_guest(guest, page=4):
    guest.run(FXSAVE, rdi=guest.va(page))
    return guest.peek(page, 0, 512)


def comparable(area):
    """An FXSAVE area without the instruction and data pointers, which are not kept."""
    stack = b"".join(area[32 + 16 * i :][:10] for i in range(8))
    return area[:5] + area[24:28] + stack + area[160:416]


@pytest.mark.parametrize("depth", range(8))
@pytest.mark.parametrize("with_xsave", [False, True])
def test_fpu_and_sse_state_survives(machines, depth, with_xsave):
    """x87 registers at any stack depth, control and tag words, MXCSR and all xmm registers come
    back in another CPU, both by an FXSAVE area and by an XSAVE record."""
    first = Guest(machines.make(8 * MIB))
    if with_xsave:
        first.vcpu.xsave = struct.pack("<QQ", 3, 7) + bytes(512) + struct.pack("<Q", 0) + bytes(56)
    fill_sse(first)
    first.run(b"".join(PUSHES[:depth]))
    expected = fxsave_by_the_guest(first)
    first.vcpu.read_registers(first.hv.cpu)
    assert comparable(bytes(first.vcpu.context.fpu_ctxt)) == comparable(expected)
    second = Guest(machines.make(8 * MIB, 2))
    second.vcpu.context = VcpuGuestContext.from_buffer_copy(bytes(first.vcpu.context))
    second.vcpu.context.ctrlreg[3] = second.l4 << 12
    second.vcpu.xsave = first.vcpu.xsave
    assert xsave_fault(second.vcpu.xsave) == ""
    if with_xsave:  # the record is what counts then
        ctypes.memset(second.vcpu.context.fpu_ctxt, 0, 512)
    second.hv.power_on()
    assert comparable(fxsave_by_the_guest(second)) == comparable(expected)


def test_the_x87_stack_is_usable_afterwards(machines):
    """A calculation begun on one CPU ends on another: pi and 1 on the stack, then a subtraction."""
    first = Guest(machines.make(8 * MIB))
    first.run(b"\xd9\xeb\xd9\xe8")  # fldpi; fld1
    first.vcpu.read_registers(first.hv.cpu)
    second = Guest(machines.make(8 * MIB, 2))
    second.vcpu.context.fpu_ctxt = first.vcpu.context.fpu_ctxt
    second.run(b"\xde\xe9\xdd\x1f", rdi=second.va(3))  # fsubp; fstp qword [rdi]
    assert struct.unpack("<d", second.peek(3, 0, 8))[0] == pytest.approx(2.141592653589793)


def xsave_record(*, xcr0=3, accum=7, present=3, compacted=0, reserved=0, nr=16 + 576):
    body = bytes(512) + struct.pack("<3Q", present, compacted, reserved) + bytes(40)
    return (struct.pack("<QQ", xcr0, accum) + body).ljust(nr, b"\0")[:nr]


BAD_XSAVE = {
    "of another size": xsave_record(nr=16 + 575),
    "no area": xsave_record(nr=16),
    "no x87": xsave_record(xcr0=2, present=0),
    "not accumulated": xsave_record(accum=1),
    "AVX without SSE": xsave_record(xcr0=5, present=0),
    "AVX-512": xsave_record(xcr0=0xE7, accum=0xE7),
    "too much present": xsave_record(present=7),
    "compacted": xsave_record(compacted=1 << 63),
    "reserved": xsave_record(reserved=1),
    "short": b"\1",
}


@pytest.mark.parametrize("record", BAD_XSAVE.values(), ids=BAD_XSAVE)
def test_an_impossible_xsave_record_is_known(record):
    """A record that the CPU would fault on is told before it is loaded."""
    assert xsave_fault(record)


def test_a_possible_xsave_record_is_taken():
    """No record, Xen's 16 zero bytes for "nothing", and areas of SSE and AVX machines are."""
    for record in (b"", bytes(16), xsave_record(), xsave_record(xcr0=7, present=7, nr=848)):
        assert xsave_fault(record) == ""


@pytest.mark.parametrize("name", ["too much present", "compacted", "reserved", "no x87"])
def test_a_refused_state_never_reaches_the_guest(guest, name):
    """If the CPU faults on the state it is given, no handler of the guest's is entered: it would
    run with all privileges and without paging, over all of the machine's memory."""
    guest.vcpu.xsave = BAD_XSAVE[name]
    guest.set_handler(13)
    guest.set_handler(6)
    guest.vcpu.context.user_regs.rsp = guest.va(2)
    with pytest.raises(EmulatorFault):
        guest.hv.power_on()
    assert not guest.hv.powered
    assert guest.hv.stopped_at == -1


def test_the_cpu_object_is_not_what_lies_before_it():
    """Something the engine points to may lie so closely before its CPU object that the pointer to
    the state seems to be in it, too: the CPU object is the one that has it at its place."""
    signature = bytes(range(64))
    memory = ctypes.create_string_buffer(1 << 18)
    base = ctypes.addressof(memory) + 15 & ~15
    engine, decoy, cpu, state = (base + offset for offset in (0, 0x4000, 0x5000, 0xD000))
    for at, value in ((engine + 16, decoy), (engine + 440, cpu), (cpu + 296, state)):
        ctypes.c_uint64.from_address(at).value = value
    ctypes.memmove(state, signature, len(signature))
    assert cpuregs.locate(engine, signature) == (cpu, state)
    ctypes.c_uint64.from_address(cpu + 296).value = 0
    with pytest.raises(cpuregs.UnsupportedEmulator):
        cpuregs.locate(engine, signature)
