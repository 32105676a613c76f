"""Stops from another thread: wherever they hit, no instruction is lost and none is done twice."""

from __future__ import annotations

import struct
import threading
import time

import pytest

from tests.guest.rig import MIB, Guest
from xsave.guest.xen import cpuregs, stops, vcpu
from xsave.guest.xen.blocks import Blocks
from xsave.guest.xen.cpuregs import R12, RSP, UnsupportedEmulator

DATA, OTHER_CODE = 4, 5
SLICES = 60
HYPERCALL = 55
#: An interrupted run ends within milliseconds; machines can be busy.
PATIENCE_S = 5
#: Each changes memory by what it finds there: done twice, it shows. rdi points at the counters.
READ_AND_WRITE = bytes.fromhex(
    "48830701"  # add qword [rdi], 1
    "48ff4708"  # inc qword [rdi + 8]
    "f048834710 01"  # lock add qword [rdi + 16], 1
    "f9 4883572000"  # stc; adc qword [rdi + 32], 0
    "53 8f4718"  # push rbx; pop qword [rdi + 24]
    "b801000000 480fc14728"  # mov eax, 1; xadd [rdi + 40], rax
)
#: mov [rsi], ebx; call rdx; add r12, rax: rdx points at `mov eax, imm; ret`, rsi at the imm.
PATCH_AND_CALL = bytes.fromhex("891e ffd2 4901c4")
FUNCTION = b"\xb8\0\0\0\0\xc3"


def loop(body):
    """`body` rbx times."""
    body += b"\x48\xff\xcb"  # dec rbx
    return body + b"\x0f\x85" + struct.pack("<i", -(len(body) + 6))  # jnz


@pytest.fixture
def guest(machines):
    guest = Guest(machines.make(16 * MIB))
    guest.power_on()
    return guest


class Interrupter:
    """Another thread that ends the runs of a guest, one after the other, as the domain process's
    ticker does: never between two."""

    def __init__(self, guest):
        self.guest = guest
        self.running = threading.Event()
        self.lock = threading.Lock()
        self.over = False

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over = True
        self.running.set()
        self.thread.join()

    def serve(self):
        while not self.over:
            self.running.wait()
            time.sleep(0.0003)
            with self.lock:
                if self.running.is_set() and not self.over:
                    self.guest.hv.interrupt()

    def run(self):
        """Run until interrupted, or stopped by the guest."""
        self.running.set()
        self.guest.hv.run()
        with self.lock:
            self.running.clear()


def run_with_stops(guest, code, **registers):
    """Run to the end, stopped again and again meanwhile; return how often."""
    guest.start(code, **registers)
    slices = 0
    with Interrupter(guest) as interrupter:
        while guest.hv.stopped_at < 0:
            interrupter.run()
            slices += 1
    return slices


def counters(guest):
    return struct.unpack("<6Q", guest.peek(DATA, 0, 48))


def test_reading_and_writing_instructions_are_done_once(guest):
    """Instructions that read memory and write it, whatever their form, are done as often as the
    loop says, although the run was ended in the midst of them many times."""
    turns, slices = 0, 0
    while slices < SLICES:
        slices += run_with_stops(guest, loop(READ_AND_WRITE), rbx=100_000, rdi=guest.va(DATA))
        turns += 100_000
    added, incremented, locked, popped, carried, exchanged = counters(guest)
    assert {added, incremented, locked, carried, exchanged} == {turns}
    assert popped == 1
    assert guest.hv.q[RSP] == guest.va(2)


@pytest.mark.parametrize("page", [0, OTHER_CODE], ids=["own page", "another page"])
def test_code_that_patches_itself_is_not_confused(guest, page):
    """Code that rewrites a function before each call of it, as Linux does at boot with its
    alternatives, gets what it wrote, each time, and counts right."""
    address = guest.va(page, 0x800)
    guest.poke(page, 0x800, FUNCTION)
    expected, turns, slices = 0, 0, 0
    guest.hv.q[R12] = 0
    while slices < SLICES:
        slices += run_with_stops(
            guest,
            loop(READ_AND_WRITE + PATCH_AND_CALL),
            rbx=3000,
            rdi=guest.va(DATA),
            rsi=address + 1,
            rdx=address,
        )
        turns += 3000
        expected += 3000 * 3001 // 2
    assert guest.hv.q[R12] == expected
    assert set(counters(guest)) == {turns, 1}


#: Loops that never cross and never end, and where they begin in page 0: what they count is rcx.
ENDLESS = {
    "nothing at all": ("ebfe", 0),
    "a register": ("48ffc1 ebfb", 0),
    "memory": ("48ff07 ebfb", 0),
    "a call": ("e80a000000 48ffc1 ebf6" + "90" * 5 + "c3", 0),
    "a call to another page": ("e8fb1f0000 48ffc1 ebf6", 0),
    "a jump through a register": ("48ffc1 ffe2", 0),
    "across two pages": ("48ffc1 48ffc1 48ffc1 ebf5", 4096 - 6),
    "from one page into the next": ("48ffc1 48ffc1 48ffc1 48ffc1 ebfb", 4096 - 4),
    "a string": ("fc 488d3f 48c7c100100000 57 f3aa 5f ebf2", 0),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_no_loop_goes_on_for_ever(guest, kind):
    """A guest that does not cross is interrupted soon, in the midst of its loop, again and again,
    whichever way its blocks lead to each other."""
    hexadecimal, offset = ENDLESS[kind]
    code, start = bytes.fromhex(hexadecimal), guest.va(0, offset)
    guest.poke(2, 0, b"\xc3")
    guest.start(code, offset=offset, rdi=guest.va(DATA), rdx=start, rcx=0)
    with Interrupter(guest) as interrupter:
        for _ in range(8):
            begun = time.monotonic()
            interrupter.run()
            assert time.monotonic() - begun < PATIENCE_S
            rip = guest.hv.q[cpuregs.RIP]
            assert start <= rip < start + len(code) or rip == guest.va(2)


@pytest.mark.parametrize("entry", [0, "another page's"])
def test_a_loop_whose_mapping_has_changed(guest, entry):
    """A guest that executes what its page tables do not lead to any more is interrupted, too."""
    table, code = guest.machine.mem[guest.l1], bytes.fromhex("ebfe")
    guest.start(code)
    before, after = table[0], table[OTHER_CODE] if entry else 0
    interrupt = guest.hv.interrupt

    def interrupt_when_changed():
        table[0] = after
        interrupt()

    guest.hv.interrupt = interrupt_when_changed
    with Interrupter(guest) as interrupter:
        for _ in range(4):
            begun = time.monotonic()
            interrupter.run()
            table[0] = before
            assert time.monotonic() - begun < PATIENCE_S
            assert guest.hv.q[cpuregs.RIP] == guest.va(0)


def test_a_block_translated_while_a_stop_began(guest):
    """The main loop has looked for a stop, one begins, and only then is a block looked up and
    translated: that one carries what the stop has set, and leads to itself by a look-up. The next
    interrupt ends it."""
    engine_stops = guest.hv.cpu._stops
    begin, interrupt = engine_stops.begin, guest.hv.interrupt
    first = []

    def begin_too_late(*, looking):
        begin(looking=looking)
        if first:
            engine_stops._cluster.value = first[0]
            engine_stops._nowhere = first[0] - 1  # as if that interrupt came but now

    def interrupt_and_see():
        interrupt()
        first[:] = first or [engine_stops._cluster.value]
        if time.monotonic() - begun > PATIENCE_S:
            engine_stops._cluster.value = 0xAB  # what ends it in any case

    guest.start(bytes.fromhex("48ffc1 ffe2"), rdx=guest.va(0), rcx=0)
    guest.hv.interrupt = interrupt_and_see
    with Interrupter(guest) as interrupter:
        for _ in range(4):
            begun = time.monotonic()
            interrupter.run()
            assert time.monotonic() - begun < PATIENCE_S
            engine_stops.begin = begin_too_late


def test_a_long_hypercall_costs_no_code(guest, monkeypatch):
    """While the hypervisor does something for the guest there is no loop to be ended, and no need
    to translate all the guest's code again."""
    looked_at = []
    pages = Blocks.pages
    monkeypatch.setattr(Blocks, "pages", lambda blocks: looked_at.append(1) or pages(blocks))

    def busy(*_arguments):
        end_ns = time.thread_time_ns() + 4 * stops._LONG_PATIENCE_NS
        while time.thread_time_ns() < end_ns:
            pass
        return 0

    guest.hv.table[HYPERCALL] = busy
    # again: mov eax, HYPERCALL; syscall; mov ecx, 1000; dec ecx; jnz; jmp again
    code = b"\xb8" + struct.pack("<I", HYPERCALL) + bytes.fromhex("0f05 b9e8030000 ffc9 75fc ebee")
    guest.start(code)
    with Interrupter(guest) as interrupter:
        for _ in range(5):
            interrupter.run()
    assert not looked_at


def test_an_interrupt_may_come_before_the_first_run(guest):
    """Who interrupts need not know whether the guest has begun to run."""
    guest.hv.interrupt()
    assert guest.run(b"\x90") == guest.va(0, 1)


def test_a_count_and_a_watch_end_a_run_in_the_midst_of_a_block(guest):
    """What needs to look at single instructions still can: before, after and between free runs."""
    code = b"\x90" * 20
    cpu, q, start = guest.hv.cpu, guest.hv.q, guest.va(0)
    assert guest.run(code) == start + 20
    q[cpuregs.RIP] = start
    cpu.run(7)
    assert q[cpuregs.RIP] == start + 7
    seen = []

    def see(rip):
        seen.append(rip)
        if rip == start + 9:
            cpu.stop()

    end = cpu.watch(start + 8, start + 9, see)
    cpu.run()
    end()
    assert (q[cpuregs.RIP], seen) == (start + 9, [start + 8, start + 9])
    assert guest.run(code) == start + 20
    assert run_with_stops(guest, loop(READ_AND_WRITE), rbx=50_000, rdi=guest.va(DATA))
    assert counters(guest)[0] == 50_000


def test_another_layout_is_noticed(guest):
    """If things are not where they are in the known release, nothing is written anywhere."""
    handle = guest.hv.cpu._handle.value
    with pytest.raises(UnsupportedEmulator):
        stops.locate_stop_flag(handle, 12345)
    with pytest.raises(UnsupportedEmulator):
        stops.locate_stop_flag(0x1000, 5608)
    with pytest.raises(UnsupportedEmulator):
        Blocks(vcpu._direct, handle + 0x1000, guest.hv.cpu._cpu)
