"""Where guest and hypervisor meet: hypercalls, exceptions, events, user mode, on a running CPU."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.rig import FULL, MIB, READ_ONLY, RETURN_TO_SELF, Guest, remove
from tests.guest.test_cpufeatures import EXTENDED_D as RDTSCP
from tests.guest.test_cpufeatures import policy
from xsave.guest.xen import cpuregs
from xsave.guest.xen.cpuregs import RAX, RBX, RCX, RDX, RIP, RSP
from xsave.guest.xen.domain import PERDOMAIN_VA
from xsave.guest.xen.events import Port


def test_a_mapping_taken_away_is_gone_at_once(guest):
    """After a hypercall that takes write access away, the next store faults: no translation of
    what was there is left, not even in the middle of a run."""
    handler = guest.set_handler(14)
    page = guest.frames[5]
    # mov [rdi], rax; update_va_mapping(rdi, rsi, 0); mov [rdi], rax
    store = b"\x48\x89\x03"  # [rbx]
    code = store + b"\xb8\x0e\x00\x00\x00\x0f\x05" + store
    entry = page << 12 | READ_ONLY
    assert guest.run(code, rbx=guest.va(5), rdi=guest.va(5), rsi=entry, rdx=0) == handler
    assert guest.vcpu.info.cr2 == guest.va(5)
    assert guest.tables.count[page] == 0
    assert guest.hv.q[RAX] == 0


def test_a_page_that_becomes_a_table_is_written_no_more(guest):
    """A writable mapping taken away by mmu_update may be used until the guest flushes, but not
    once its page is a page table: the first store after the pin faults."""
    handler = guest.set_handler(14)
    page = guest.frames[5]
    guest.poke(5, 0, bytes(4096))
    guest.poke(6, 0, struct.pack("<QQ", guest.l1 << 12 | 8 * 5, page << 12 | READ_ONLY))
    guest.poke(7, 0, struct.pack("<IIQQ", 0, 0, page, 0))  # MMUEXT_PIN_L1_TABLE
    store = b"\x48\xc7\x03\x00\x00\x00\x00"  # mov qword [rbx], 0
    mmu_update = b"\xb8\x01\x00\x00\x00\x0f\x05"
    pin = b"\x48\x89\xef\xb8\x1a\x00\x00\x00\x0f\x05"  # mov rdi, rbp; mmuext_op
    registers = {"rbx": guest.va(5), "rdi": guest.va(6), "rbp": guest.va(7)}
    registers |= {"rsi": 1, "rdx": 0, "r10": 0x7FF0}
    code = store + mmu_update + pin + store
    assert guest.run(code, **registers) == handler
    assert guest.hv.q[RAX] == 0
    assert guest.vcpu.info.cr2 == guest.va(5)
    assert guest.stacked(4)[3] == guest.va(0, len(code) - len(store))


def test_a_flush_of_one_page_is_enough(guest):
    """MMUEXT_INVLPG_LOCAL: what mmu_update took away at that address is gone at once."""
    handler = guest.set_handler(14)
    guest.poke(6, 0, struct.pack("<QQ", guest.l1 << 12 | 8 * 5, guest.frames[5] << 12 | READ_ONLY))
    guest.poke(7, 0, struct.pack("<IIQQ", 7, 0, guest.va(5), 0))
    store = b"\x48\x89\x03"  # mov [rbx], rax
    mmu_update = b"\xb8\x01\x00\x00\x00\x0f\x05"
    flush = b"\x48\x89\xef\xb8\x1a\x00\x00\x00\x0f\x05"
    registers = {"rbx": guest.va(5), "rdi": guest.va(6), "rbp": guest.va(7)}
    registers |= {"rsi": 1, "rdx": 0, "r10": 0x7FF0}
    code = store + mmu_update + flush + store
    assert guest.run(code, **registers) == handler
    assert guest.stacked(4)[3] == guest.va(0, len(code) - len(store))


def test_a_page_xen_copied_is_executed_as_it_is_now(guest):
    """MMUEXT_COPY_PAGE over code that ran before: the new code runs, in the same run."""
    ret_one, ret_two = (b"\xb8" + bytes([n, 0, 0, 0]) + b"\xc3" for n in (1, 2))
    guest.poke(5, 0, ret_one)
    guest.poke(6, 0, ret_two)
    guest.tables.update_entry(guest.l1, 5, guest.frames[5] << 12 | READ_ONLY)
    op = struct.pack("<IIQQ", 17, 0, guest.frames[5], guest.frames[6])
    guest.poke(7, 0, op)
    call = b"\xff\xd3"  # rbx
    mmuext = b"\xb8\x1a\x00\x00\x00\x0f\x05"
    code = call + b"\x50" + mmuext + call + b"\x59"  # push the first result, pop it to rcx
    registers = {"rbx": guest.va(5), "rdi": guest.va(7), "rsi": 1, "rdx": 0, "r10": 0x7FF0}
    assert guest.run(code, **registers) == guest.va(0, len(code))
    assert (guest.hv.q[RAX], guest.hv.q[RCX]) == (2, 1)


def test_descriptors_are_read_from_the_guests_gdt(guest):
    """A selector of the guest's GDT can be loaded once set_gdt mapped it, and faults before."""
    handler = guest.set_handler(13)
    guest.tables.update_entry(guest.l1, 5, guest.frames[5] << 12 | READ_ONLY)
    guest.poke(5, 16, struct.pack("<Q", 0x00CFF3000000FFFF))  # data, DPL 3
    load = b"\x8e\xd8"  # mov ds, ax
    assert guest.run(load, rax=0x13) == handler
    guest.poke(6, 0, struct.pack("<Q", guest.frames[5]))
    guest.run(b"\xb8\x02\x00\x00\x00\x0f\x05", rdi=guest.va(6), rsi=512)
    assert guest.run(load, rax=0x13) == guest.va(0, 2)
    guest.vcpu.read_registers(guest.hv.cpu)
    assert guest.vcpu.context.user_regs.ds == 0x13


def test_selectors_of_an_image_outlive_a_return_to_the_kernel_itself(guest):
    """An iretq empties segments that it could not have loaded, and no other."""
    names = ("ds", "es", "fs", "gs")
    for name in names:
        setattr(guest.vcpu.context.user_regs, name, 0x2B)
    guest.vcpu.context.fs_base, guest.vcpu.context.gs_base_kernel = 0x1111, 0x2222
    assert guest.run(RETURN_TO_SELF, rsp=guest.va(9)) == guest.va(0, len(RETURN_TO_SELF))
    guest.vcpu.read_registers(guest.hv.cpu)
    context = guest.vcpu.context
    assert [getattr(context.user_regs, name) for name in names] == [0x2B] * 4
    assert (context.fs_base, context.gs_base_kernel) == (0x1111, 0x2222)


def test_xens_mappings_are_not_the_guests(guest):
    """The guest reads the m2p, and neither writes it nor reads its own GDT's mapping."""
    handler = guest.set_handler(14)
    m2p = 0xFFFF_8000_0000_0000 + 8 * guest.frames[7]
    assert guest.run(b"\x48\x8b\x07", rdi=m2p) == guest.va(0, 3)
    assert guest.hv.q[RAX] == 7
    assert guest.run(b"\x48\x89\x07", rdi=m2p) == handler
    assert guest.run(b"\x48\x8b\x07", rdi=PERDOMAIN_VA) == handler
    assert guest.machine.m2p[guest.frames[7]] == 7


def test_faults_do_not_double(guest):
    """Page faults and general protection faults one after the other are each themselves: no
    double fault comes of them."""
    page_fault, protection = guest.set_handler(14), guest.set_handler(13)
    for _ in range(3):
        for code, handler, vector_code in (
            (b"\x48\x8b\x07", page_fault, 0),
            (b"\x48\x89\x07", page_fault, 2),
            (b"\x8e\xd8", protection, 0xFFF8),
        ):
            assert guest.run(code, rdi=0x7000_0000, rax=0xFFF8, rsp=guest.va(2)) == handler
            assert guest.stacked(3)[2] == vector_code


def test_counted_runs_are_exact(machines):
    """run(count) executes exactly that many instructions, from wherever the guest is."""
    guest = Guest(machines.make(8 * MIB))
    guest.power_on()
    guest.poke(0, 0, b"\x48\xff\xc0" * 100)  # inc rax
    guest.hv.q[RIP], guest.hv.q[RAX] = guest.va(0), 0
    for count in (1, 7, 30):
        before = guest.hv.q[RAX]
        guest.hv.cpu.run(count)
        assert guest.hv.q[RAX] == before + count


def test_rdtsc_is_the_domains_clock(guest):
    """rdtsc and rdtscp give the domain's time, not the host's."""
    guest.domain.policy = policy([(RDTSCP, 27)])
    guest.domain.clock.extend()
    guest.run(b"\x0f\x31")
    assert guest.hv.q[RDX] << 32 | guest.hv.q[RAX] == guest.domain.clock.now()
    guest.run(b"\x0f\x01\xf9")
    assert guest.hv.q[RDX] << 32 | guest.hv.q[RAX] == guest.domain.clock.now()


def test_a_stop_shows_no_other_clock(guest):
    """A stop that comes when the next instruction is a rdtsc, as a stop from another thread may,
    does not let the host's clock through."""
    guest.domain.clock.extend()
    clock = guest.hv.rdtsc

    def rdtsc():
        guest.hv.cpu.stop()
        return clock()

    guest.hv.rdtsc = rdtsc
    code = b"\x0f\x31" * 4
    guest.run(code)
    for _ in range(4):
        assert guest.hv.q[RDX] << 32 | guest.hv.q[RAX] == guest.domain.clock.now()
        if guest.hv.stopped_at != guest.va(0, len(code)):
            guest.hv.run()
    assert guest.hv.stopped_at == guest.va(0, len(code))


def test_cpuid_is_the_policys(guest):
    """cpuid, native or with Xen's forced-emulation prefix, answers from the domain's policy."""
    for code in (b"\x0f\xa2", b"\x0f\x0bxen\x0f\xa2"):
        assert guest.run(code, rax=1, rcx=0) == guest.va(0, len(code))
        assert guest.hv.q[RCX] == 0x80002001
        guest.run(code, rax=0x40000000, rcx=0)
        assert guest.hv.q[RBX] == 0x566E6558


def test_ud2_is_the_guests_own(guest):
    """Any other undefined instruction is the guest's #UD, at that instruction."""
    handler = guest.set_handler(6)
    assert guest.run(b"\x90\x0f\x0b") == handler
    assert guest.stacked(3)[2] == guest.va(0, 1)


def test_a_fault_without_a_handler_crashes_the_domain(guest):
    """A guest with no handler for its fault is crashed, with vector and address in the message."""
    assert guest.run(b"\x48\x8b\x07", rdi=0) == -1
    assert guest.domain.shutdown_reason is not None
    assert "exception 14" in guest.domain.crash_message
    assert f"{guest.va(0):#x}" in guest.domain.crash_message


def test_no_stack_for_a_frame_crashes_the_domain(guest):
    """A kernel whose stack is not there when an exception comes is crashed, not Xen."""
    guest.set_handler(14)
    assert guest.run(b"\x48\x8b\x07", rdi=0, rsp=0x8000) == -1
    assert "no kernel stack" in guest.domain.crash_message


# -- frames on the kernel's stack ---

TRAP = 0x80  # a gate the tests open
#: Pops what the exception pushed and goes back by HYPERVISOR_iret.
IRET = (
    b"\x59\x41\x5b"  # pop rcx; pop r11
    b"\x6a\x00\x51\x41\x53\x50"  # push 0; push rcx; push r11; push rax
    b"\xb8\x17\x00\x00\x00\x0f\x05"  # mov eax, 23; syscall
)
KERNEL_CS = 0xE030
LIVE = 0x8D5 | 0x400 | 0x200000
GENERAL = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{i}" for i in range(8, 16))]


def returning(guest, page, vector, flags=0):
    """Give the guest a handler that just returns."""
    guest.poke(page, 0, IRET)
    guest.vcpu.set_trap(vector, flags, 0xE033, guest.va(page))


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, (1 << 64) - 1), min_size=15, max_size=15),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, 31),
    st.booleans(),
)
def test_a_trap_and_back(module_machine, values, flags, misalign, masked):
    """After an exception's frame and HYPERVISOR_iret every register, the flags, the stack (even
    a misaligned one) and the upcall mask are what they were."""
    guest = Guest(module_machine)
    try:
        returning(guest, 5, TRAP)
        guest.power_on()
        guest.vcpu.info.evtchn_upcall_mask = masked
        wanted = dict(zip(GENERAL, values, strict=True)) | {"rsp": guest.va(2) - misalign}
        flags = flags & LIVE | 0x202
        guest.hv.cpu.rflags = flags
        assert guest.run(b"\xcd\x80", **wanted) == guest.va(0, 2)
        q = guest.hv.q
        assert {name: q[getattr(cpuregs, name.upper())] for name in wanted} == wanted
        assert guest.hv.cpu.rflags == flags
        assert guest.vcpu.info.evtchn_upcall_mask == masked
    finally:
        remove(guest.domain)


@pytest.mark.parametrize("masked", [0, 1])
@pytest.mark.parametrize("disables", [0, 4])
def test_the_frame_of_a_fault(guest, masked, disables):
    """Low to high: rcx, r11, the error code, rip, cs with ring 0 and the upcall mask, flags whose
    IF is the mask's opposite, rsp, ss; the handler's gate says whether upcalls are masked."""
    handler = guest.set_handler(14, disables)
    guest.power_on()
    guest.vcpu.info.evtchn_upcall_mask = masked
    guest.hv.cpu.rflags = 0x202 | 0x401
    stopped = guest.run(b"\x48\x8b\x07", rdi=0x666000, rcx=1, r11=2, rsp=guest.va(2, -5))
    assert stopped == handler
    assert guest.hv.q[RSP] % 16 == 0
    rcx, r11, code, rip, cs, flags, rsp, ss = guest.stacked(8)
    assert (rcx, r11, code, rip) == (1, 2, 0, guest.va(0))
    assert cs == KERNEL_CS | masked << 32
    assert flags == 0x402 | 1 | (0 if masked else 0x200)
    assert (rsp, ss) == (guest.va(2, -5), 0xE02B)
    assert guest.vcpu.info.evtchn_upcall_mask == (masked or disables == 4)
    assert guest.vcpu.info.cr2 == 0x666000


@pytest.mark.parametrize(("flags", "restored"), [(0, True), (0x100, False), (0x1FF, False)])
def test_iret_restores_what_the_frame_says(guest, flags, restored):
    """rax, rsp, rip and flags come from the frame; rcx and r11 too, unless it says that the guest
    returns from a syscall, which left nothing in them."""
    frame = struct.pack(
        "<9Q", 1, 2, 3, flags, guest.va(0, 2), 0xE030, 0x243, guest.va(1, 64), 0xE02B
    )
    guest.poke(1, 1024, frame)
    assert guest.run(b"\x0f\x05", rax=23, rcx=77, r11=88, rsp=guest.va(1, 1024)) == guest.va(0, 2)
    q = guest.hv.q
    assert (q[RAX], q[RSP], guest.hv.cpu.rflags) == (1, guest.va(1, 64), 0x243)
    assert (q[cpuregs.R11], q[RCX]) == ((2, 3) if restored else (88, 77))


# -- events ---


@pytest.fixture
def listening(guest):
    """A guest with an event callback at `callback` and an unmasked port."""
    guest.callback = guest.va(6)
    guest.poke(6, 0, b"\x0f\x05")
    guest.stops.add(guest.callback)
    guest.vcpu.context.event_callback_eip = guest.callback
    guest.domain.shared.evtchn_mask[0] = 0
    guest.port = guest.domain.events.bind(Port("ipi"))
    guest.vcpu.info.evtchn_upcall_mask = 0
    return guest


XEN_VERSION = b"\xb8\x11\x00\x00\x00\x0f\x05"  # a hypercall that does nothing


def test_a_pending_event_interrupts_the_next_crossing(listening):
    """The upcall comes when the guest next crosses into Xen, behind the hypercall, with upcalls
    masked; a masked guest gets none until it unmasks."""
    guest = listening
    guest.power_on()
    guest.vcpu.info.evtchn_upcall_mask = 1
    guest.domain.events.set_pending(guest.port)
    assert guest.run(XEN_VERSION, rdi=0) == guest.va(0, 7)
    guest.vcpu.info.evtchn_upcall_mask = 0
    assert guest.run(XEN_VERSION, rdi=0, rsp=guest.va(2)) == guest.callback
    assert guest.vcpu.info.evtchn_upcall_mask == 1
    assert guest.stacked(4)[2] == guest.va(0)  # at once, as it was pending before the run


def test_an_event_of_the_hypercall_itself(listening):
    """An event raised by a hypercall comes before its next instruction: the frame's rip is behind
    the hypercall, and rax is its result."""
    guest = listening
    guest.poke(7, 0, struct.pack("<I", guest.port))
    send = b"\xb8\x20\x00\x00\x00\x0f\x05"
    assert guest.run(send, rdi=4, rsi=guest.va(7), rsp=guest.va(2)) == guest.callback
    assert guest.stacked(3)[2] == guest.va(0, 7)
    assert guest.hv.q[RAX] == 0


def test_iret_that_unmasks_takes_the_event(listening):
    """An event that is pending when the guest returns from an exception comes right there."""
    guest = listening
    returning(guest, 5, TRAP, flags=4)
    guest.power_on()
    guest.domain.events.set_pending(guest.port)
    guest.vcpu.info.evtchn_upcall_pending = 0
    guest.poke(5, 0, b"\xc6\x03\x01" + IRET)  # mov byte [rbx], 1: evtchn_upcall_pending
    info = guest.domain.shared_info_mfn << 12
    assert guest.tables.update_entry(guest.l1, 100, info | FULL) == 0
    stopped = guest.run(b"\xcd\x80", rbx=guest.va(100), rsp=guest.va(2))
    assert stopped == guest.callback
    assert guest.stacked(3)[2] == guest.va(0, 2)


def test_blocking_stops_and_an_event_goes_on(listening):
    """SCHEDOP_block ends the run unmasked; with an event pending it does not block at all."""
    guest = listening
    guest.power_on()
    guest.vcpu.info.evtchn_upcall_mask = 1
    block = b"\xb8\x1d\x00\x00\x00\x0f\x05"
    assert guest.run(block, rdi=1) == -1
    assert guest.vcpu.blocked
    assert guest.vcpu.info.evtchn_upcall_mask == 0
    guest.vcpu.blocked = False
    guest.vcpu.info.evtchn_upcall_mask = 1
    guest.domain.events.set_pending(guest.port)
    assert guest.run(block, rdi=1, rsp=guest.va(2)) == guest.callback
    assert not guest.vcpu.blocked


def test_a_kick_ends_the_run_at_the_next_crossing(guest):
    """kick() from outside lets the run end, with the guest where it was."""
    original = guest.hv.call
    guest.hv.call = lambda *a: guest.hv.kick() or original(*a)
    assert guest.run(XEN_VERSION + b"\x90" * 3, rdi=0) == -1
    assert guest.hv.q[RIP] == guest.va(0, 7)
