"""Where guest and hypervisor meet: hypercalls, exceptions, events, user mode, on a running CPU."""

from __future__ import annotations

import struct

from tests.guest.rig import MIB, READ_ONLY, Guest
from xsave.guest.xen.cpuregs import RAX, RBX, RCX, RDX, RIP
from xsave.guest.xen.domain import PERDOMAIN_VA


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
    guest.domain.clock.extend()
    guest.run(b"\x0f\x31")
    assert guest.hv.q[RDX] << 32 | guest.hv.q[RAX] == guest.domain.clock.now()
    guest.run(b"\x0f\x01\xf9")
    assert guest.hv.q[RDX] << 32 | guest.hv.q[RAX] == guest.domain.clock.now()


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
