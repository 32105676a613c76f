"""The crossings that the library answers end as they do in Python, and it is what its source says.

Two guests alike live on two machines alike, one with the library and one without. Whatever they
do, registers, memory and the frames' types and counts are the same afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.rig import FULL, MIB, READ_ONLY, RETURN_TO_SELF, Guest, Machines
from xsave.frames import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PTE_GLOBAL,
    PTE_PRESENT,
    PTE_PSE,
    PTE_PWT,
    PTE_RW,
    PTE_USER,
)
from xsave.guest.xen import fastpath, hypervisor
from xsave.guest.xen.cpuregs import (
    CS_BASE,
    CS_SEL,
    FS_BASE,
    GS_BASE,
    GS_SEL,
    HFLAG_CODE32,
    HFLAG_CODE64,
    HFLAG_STACK32,
    HFLAGS,
    R11,
    RAX,
    RBX,
    RCX,
    RDX,
    RIP,
    RSP,
    SS_SEL,
)
from xsave.guest.xen.domain import RESERVED_GDT_PAGE
from xsave.guest.xen.fastpath import NR_CROSSINGS
from xsave.guest.xen.pagetypes import PGT_L4
from xsave.guest.xen.time import RealClock

SEGMENTS = (CS_SEL, CS_BASE, SS_SEL, FS_BASE, GS_SEL, GS_BASE)
LONG_MODE = HFLAG_CODE64 | HFLAG_CODE32 | HFLAG_STACK32
SOURCE = Path(fastpath.__file__).parents[1] / "fastpath"
DOMID_SELF = 0x7FF0
NR = 40
ARGUMENTS, OUT = 4, 5  # pages of the guest
FIRST_LOOSE, ROOTS = 8, (32, 33, 34, 35)
MMU_UPDATE, STACK_SWITCH, XEN_VERSION, IRET = 1, 3, 17, 23
VCPU_OP, SET_SEGMENT_BASE, MMUEXT_OP = 24, 25, 26
STACK = 2  # the stack's top is this page's beginning
#: syscall; mov rbx, rax; mov eax, 255 (the `syscall` that ends the run is no hypercall)
HYPERCALL = b"\x0f\x05\x48\x89\xc3\xb8\xff\x00\x00\x00"
CLI = b"\xfa"
#: mov eax, 255; syscall, which is no hypercall either
END, SYSCALL_IN_END = b"\xb8\xff\x00\x00\x00\x0f\x05", 5

pytestmark = pytest.mark.skipif(fastpath.library() is None, reason="no library for this machine")


class StandingClock(RealClock):
    """A clock that is real, as far as anybody can see, but always shows the same time."""

    def __init__(self) -> None:
        super().__init__()
        self._start = 0

    def now(self) -> int:
        return 10**9


class Twins:
    """Two guests, of which the first has the library."""

    def __init__(self) -> None:
        self.both = [Machines(), Machines()]
        self.guests = [make(machines) for machines in self.both]
        self.guests[0].power_on()
        with without_library():
            self.guests[1].power_on()
        # The first crossing is Python's: it forgets what was mapped while the guest was made.
        self.do(hypercall(0))

    def close(self) -> None:
        for machines in self.both:
            machines.close()

    def nr_quick(self) -> int:
        """How many crossings the library has answered."""
        quick, slow = (guest.hv.fastpath.words[NR_CROSSINGS] for guest in self.guests)
        assert slow == 0
        return quick

    def do(self, change) -> None:
        """Do something to both; they are alike afterwards."""
        for guest in self.guests:
            with contextlib.suppress(Ended):
                change(guest)
        first, second = (state(guest) for guest in self.guests)
        for name, value in first.items():
            same = np.array_equal if isinstance(value, np.ndarray) else list.__eq__
            assert same(value, second[name]), (name, value, second[name])


class Ended(Exception):
    """The guest is no more."""


@contextlib.contextmanager
def without_library():
    original = hypervisor.library
    hypervisor.library = lambda: None
    try:
        yield
    finally:
        hypervisor.library = original


@pytest.fixture
def twins():
    made = Twins()
    yield made
    made.close()


def make(machines: Machines) -> Guest:
    """A guest with four more L4 tables, all alike, and another domain on its machine."""
    machine = machines.make(16 * MIB)
    guest = Guest(machine, NR)
    guest.domain.clock = StandingClock()
    Guest(machine, domid=2)
    for page in ROOTS:
        mfn = guest.frames[page]
        machine.mem[mfn] = machine.mem[guest.l4]
        assert guest.tables.update_entry(guest.l1, page, mfn << PAGE_SHIFT | READ_ONLY) == 0
        assert guest.tables.pin(mfn, PGT_L4) == 0
    guest.vcpu.context.event_callback_eip = guest.va(6)
    guest.poke(6, 0, END)
    guest.stops.add(guest.va(6, SYSCALL_IN_END))
    return guest


def state(guest: Guest) -> dict[str, object]:
    """All of a guest that a crossing may change."""
    machine, context, tables = guest.machine, guest.vcpu.context, guest.tables
    return {
        "registers": [guest.hv.q[i] for i in (RAX, RBX, RCX, RDX, R11, RIP, RSP)],
        "segments": [guest.hv.q[i] for i in SEGMENTS],
        "flags": [guest.hv.cpu.rflags, guest.hv.cpu.state.d[HFLAGS] & LONG_MODE],
        "stack": [context.kernel_ss, context.kernel_sp, context.gs_base_user],
        "stopped": [guest.hv.stopped_at],
        "memory": machine.mem,
        "owner": machine.owner,
        "types": machine.page_type,
        "counts": machine.type_count,
        "references": machine.refs,
        "pins": machine.pinned,
        "control": list(context.ctrlreg),
        "flush": [tables.unflushed, tables.stale_tlb, tables.stale_pages],
        "mask": [guest.vcpu.info.evtchn_upcall_mask, guest.vcpu.in_kernel],
        "end": [guest.domain.shutdown_reason, guest.domain.crash_message],
        "timer": [guest.vcpu.timer_ns],
        "crossings": [guest.hv.nr_crossings],
    }


def hypercall(number, *arguments, requests=b"", pending=False, code=HYPERCALL, stack=None):
    """What has a guest make a hypercall; `requests` lie where the first argument shows. stack:
    where its stack ends, relative to where it should."""

    def change(guest: Guest) -> None:
        if guest.domain.shutdown_reason is not None:
            raise Ended
        guest.poke(ARGUMENTS, 0, requests)
        guest.vcpu.info.evtchn_upcall_mask = 0
        guest.vcpu.info.evtchn_upcall_pending = 0
        values = [a(guest) if callable(a) else a for a in arguments]
        registers = dict(zip(("rdi", "rsi", "rdx", "r10"), values, strict=False))
        guest.start(code, rax=number, rbx=0, rsp=guest.va(STACK) + (stack or 0), **registers)
        guest.vcpu.info.evtchn_upcall_pending = pending
        if pending:  # `run` would deliver it at once: let it come with the crossing
            guest.vcpu.info.evtchn_upcall_mask = 1
            guest.hv._deliver = unmasking(guest)
        guest.hv.run()

    return change


def unmasking(guest: Guest):
    """A delivery that only unmasks events, the first time: the beginning of a run."""

    def first(_skip: int) -> bool:
        guest.vcpu.info.evtchn_upcall_mask = 0
        del guest.hv._deliver
        return False

    return first


def frames_of(guest: Guest) -> list[int]:
    """Frames that a request may name: all kinds."""
    domain, last = guest.domain, guest.machine.nr_frames - 1
    foreign = int(np.flatnonzero(guest.machine.owner == 2)[0])
    strange = [domain.shared_info_mfn, domain.scratch_mfn, foreign, 0, 1, last, last + 1, 1 << 39]
    return [*guest.frames, *strange]


NR_NAMED = NR + 4 + 8
FLAGS = st.sampled_from(
    [
        FULL, READ_ONLY, 0, PTE_PRESENT, PTE_PRESENT | PTE_RW, FULL | PTE_PWT, FULL | PTE_PSE,
        FULL | 1 << 63, PTE_RW | PTE_USER, FULL | 1 << 52,
    ]
)  # fmt: skip
named = st.integers(0, NR_NAMED - 1)
loose = st.integers(FIRST_LOOSE, NR - 1)
usual = st.tuples(st.just(NR), loose, st.just(0), loose, st.sampled_from([FULL, READ_ONLY, 0]))
update = usual | st.tuples(named, st.integers(0, 60), st.sampled_from([0] * 8 + [1, 2, 3, 4]),
                           named, FLAGS)  # fmt: skip
count = st.sampled_from([None] * 8 + [0, 1, 40, 1 << 31, 1 << 32])
done_ptr = st.sampled_from([0] * 5 + [OUT])
domid = st.sampled_from([DOMID_SELF] * 7 + [1, 2, DOMID_SELF | 2 << 16])
pending = st.sampled_from([False] * 4 + [True])
root = st.sampled_from([*ROOTS, NR + 3]) | named
switch = st.tuples(st.just(5), root), st.tuples(st.just(15), root)
extended = st.one_of(
    st.tuples(*switch), st.lists(st.tuples(st.sampled_from([5, 15, 4, 3, 0, 6, 7, 99]), root),
                                 min_size=1, max_size=3),
)  # fmt: skip


stack = st.sampled_from([0] * 6 + [8, 24, 40, 56, 72, 4 * PAGE_SIZE, 60 * PAGE_SIZE, 1 << 62])
word = st.sampled_from([0, 1, 0xE02B, 1 << 32, 1 << 47, (1 << 64) - 8])
base = st.sampled_from(
    [0, 3, 4, 8, 0x33, 0x10000, 0x10003, 1 << 32, (1 << 47) - 1, 1 << 47, 0x1FFFF << 47, 1 << 63]
)
iret_frames = st.tuples(
    st.sampled_from([0, 0, 0x100]), st.sampled_from([0xE030, 0xE030, 0x10, 0xE033, 0x50000E030]),
    st.sampled_from([2, 0x202, 0x202, 0x302, 0x246, 0xFFFFFFFFFFFFFFFF & ~0x100, 0x8D7 | 1 << 18]),
    st.sampled_from([0xE02B, 0, 0x1E028]),
)  # fmt: skip
timers = st.tuples(
    st.sampled_from([0, 0, 0, 1, 1 << 32]),
    st.sampled_from([0, 1, 10**9 - 1, 10**9, 10**9 + 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1]),
    st.sampled_from([0, 0, 0, 1, 2, 3]), st.sampled_from([0, 8, 0xFF4, 0xFF8]),
)  # fmt: skip
NUMBERS = {"stack": STACK_SWITCH, "segment": SET_SEGMENT_BASE, "version": XEN_VERSION}


def iret(flags, cs, rflags, ss, *, stack, pending=False):
    """What has a guest return from a trap, to a `syscall` that ends the run, on page 3's stack."""

    def change(guest: Guest) -> None:
        frame = struct.pack("<9Q", 255, 11, 12, flags, guest.va(6, SYSCALL_IN_END), cs, rflags,
                            guest.va(4), ss)  # fmt: skip
        guest.poke(STACK - 1, PAGE_SIZE - len(frame), frame)
        at = (stack or 0) - len(frame)
        hypercall(IRET, pending=pending, stack=at)(guest)

    return change


@st.composite
def crossings(draw):
    """One crossing, as (kind, what it is about)."""
    kind = draw(st.sampled_from([
        "update", "update", "extended", "is up", "cli", "elsewhere", "stack", "segment", "version",
        "iret", "timer",
    ]))  # fmt: skip
    content = {
        "update": st.lists(update, min_size=1, max_size=3), "extended": extended,
        "is up": st.tuples(st.integers(0, 4), st.sampled_from([0, 1, 31, 64, 1 << 31, 1 << 40])),
        "stack": st.tuples(word, word), "segment": st.tuples(st.integers(0, 4) | word, base),
        "version": st.tuples(st.sampled_from([0, 0, 7, 99, 1 << 32])), "iret": iret_frames,
        "timer": timers, "cli": st.none(), "elsewhere": st.sampled_from([MMU_UPDATE, MMUEXT_OP]),
    }[kind]  # fmt: skip
    return kind, draw(content), draw(count), draw(done_ptr), draw(domid), draw(pending), draw(stack)


def change_of(crossing):
    """What has a guest make this crossing."""
    kind, content, nr, out, whose, event, off = crossing
    given = {"pending": event, "stack": off}

    def change(guest: Guest) -> None:
        named_frames = frames_of(guest)
        rest = ((len(content) if nr is None else nr) if kind in ("update", "extended") else 0,
                guest.va(out) if out else 0, whose)  # fmt: skip
        here = guest.va(ARGUMENTS)
        if kind == "update":
            requests = b"".join(
                struct.pack("<QQ", named_frames[table] << PAGE_SHIFT | 8 * slot | command,
                            named_frames[target] << PAGE_SHIFT & (1 << 52) - 1 | flags)
                for table, slot, command, target, flags in content
            )  # fmt: skip
            hypercall(MMU_UPDATE, here, *rest, requests=requests, **given)(guest)
        elif kind == "extended":
            requests = b"".join(
                struct.pack("<IIQQ", op, 0, named_frames[target], 0) for op, target in content
            )
            hypercall(MMUEXT_OP, here, *rest, requests=requests, **given)(guest)
        elif kind == "is up":
            hypercall(VCPU_OP, *content, **given)(guest)
        elif kind in NUMBERS:
            hypercall(NUMBERS[kind], *content, **given)(guest)
        elif kind == "timer":
            vcpu, timeout, flags, offset = content
            guest.poke(ARGUMENTS, offset, struct.pack("<QI", timeout, flags))
            hypercall(VCPU_OP, 8, vcpu, guest.va(ARGUMENTS, offset), **given)(guest)
        elif kind == "iret":
            iret(*content, **given)(guest)
        elif kind == "cli":
            hypercall(0, code=CLI + HYPERCALL[2:], **given)(guest)
        else:  # requests that are not there, or go over the end of a page
            for address in (guest.va(60), guest.va(ARGUMENTS, 0xFF8), 1 << 47):
                hypercall(content, address, 1, 0, whose, **given)(guest)

    return change


@settings(max_examples=40, deadline=None)
@given(st.lists(crossings(), min_size=1, max_size=12))
def test_the_library_does_what_python_does(sequence):
    twins = Twins()
    try:
        for crossing in sequence:
            twins.do(change_of(crossing))
    finally:
        twins.close()


def kinds_of(guest: Guest) -> list[int]:
    """One frame of each kind that an entry, or a base pointer, may name or may not."""
    strange = frames_of(guest)[len(guest.frames) :]
    return [guest.frames[p] for p in (9, 32, NR, NR + 1, NR + 2, NR + 3)] + strange


@pytest.mark.parametrize("before", [0, FULL, READ_ONLY])
def test_an_entry_of_each_kind(twins, before):
    """Every kind of frame with every kind of flags, in the place of each of three entries."""
    number = len(kinds_of(twins.guests[0]))
    flags = [FULL, READ_ONLY, 0, PTE_PRESENT, PTE_PRESENT | PTE_RW, FULL | PTE_PWT, FULL | PTE_PSE]

    def changes(guest: Guest, values: list[int]) -> bytes:
        slot = guest.l1 << PAGE_SHIFT | 8 * 10
        return b"".join(struct.pack("<QQ", slot, value) for value in values)

    for kind in range(number):
        for flag in flags:
            guest = twins.guests[0]
            values = [guest.frames[11] << PAGE_SHIFT | before if before else 0,
                      kinds_of(guest)[kind] << PAGE_SHIFT & (1 << 52) - 1 | flag]  # fmt: skip
            for value in values:
                twins.do(hypercall(MMU_UPDATE, lambda g: g.va(ARGUMENTS), 1, 0, DOMID_SELF,
                                   requests=changes(guest, [value])))  # fmt: skip
    assert twins.guests[0].domain.shutdown_reason is None
    assert twins.nr_quick() >= number * len(flags)  # all the first ones


def test_an_entry_in_each_kind_of_table(twins):
    """Simple are those of L1 tables, and new ones of L2 and L3 tables: one of any other frame, in
    each kind of frame, with each command."""
    guest = twins.guests[0]
    number = len(kinds_of(guest))
    for table in range(number):
        for target in range(number):
            for command, flags in (
                (0, FULL | PTE_PSE), (0, FULL | PTE_GLOBAL), (0, FULL), (0, READ_ONLY), (0, 0),
                (0, PTE_RW), (0, PTE_PRESENT), (1, FULL), (2, FULL), (4, 0),
            ):  # fmt: skip
                where, what = (kinds_of(guest)[kind] << PAGE_SHIFT for kind in (table, target))
                # A slot that nothing lies behind; in the m2p, an entry of the frame's own.
                request = struct.pack(
                    "<QQ", where | 8 * 300 | command, what & (1 << 52) - 1 | flags
                )
                twins.do(hypercall(MMU_UPDATE, lambda g: g.va(ARGUMENTS), 1, 0, DOMID_SELF,
                                   requests=request))  # fmt: skip
    assert guest.domain.shutdown_reason is None


def test_base_pointers_of_each_kind(twins):
    """Every kind of frame as the kernel's and as the user's, behind several others."""
    guest = twins.guests[0]
    number = len(kinds_of(guest))
    current = guest.frames[NR + 3]

    def load(kernel: int, user: int) -> None:
        request = struct.pack("<IIQQIIQQ", 5, 0, kernel, 0, 15, 0, user, 0)
        twins.do(hypercall(MMUEXT_OP, lambda g: g.va(ARGUMENTS), 2, 0, DOMID_SELF,
                           requests=request))  # fmt: skip

    for kernel in range(number):
        for user in range(number):
            load(current, 0)
            load(guest.frames[32], guest.frames[33])
            load(*(kinds_of(guest)[kind] for kind in (kernel, user)))
    assert guest.domain.shutdown_reason is None
    assert twins.nr_quick() >= 2 * number


@pytest.mark.parametrize("first", [False, True])
def test_a_table_that_nothing_holds_any_more_is_given_up(twins, first):
    """One that was pinned when it was loaded, and is not when another takes its place."""
    guest = twins.guests[0]
    kernel, user = (guest.frames[page] for page in (32, 33))
    load = struct.pack("<IIQQIIQQ", 5, 0, kernel, 0, 15, 0, user, 0)
    unpin = struct.pack("<IIQQ", 4, 0, kernel if first else user, 0)
    away = struct.pack("<IIQQIIQQ", 5, 0, guest.frames[34], 0, 15, 0, guest.frames[35], 0)
    for nr, request in ((2, load), (1, unpin), (2, away)):
        twins.do(hypercall(MMUEXT_OP, lambda g: g.va(ARGUMENTS), nr, 0, DOMID_SELF,
                           requests=request))  # fmt: skip
    assert guest.tables.count[kernel if first else user] == 0


@pytest.mark.parametrize("pinned", [True, False])
def test_a_table_in_both_places_is_let_go_of_twice(twins, pinned):
    """The kernel's and the user's at once, and held by nothing else, it is given up."""
    guest = twins.guests[0]
    both = guest.frames[32]
    load = struct.pack("<IIQQIIQQ", 5, 0, both, 0, 15, 0, both, 0)
    unpin = b"" if pinned else struct.pack("<IIQQ", 4, 0, both, 0)
    away = struct.pack("<IIQQIIQQ", 5, 0, guest.frames[34], 0, 15, 0, guest.frames[35], 0)
    for request in (load, unpin, away):
        twins.do(hypercall(MMUEXT_OP, lambda g: g.va(ARGUMENTS), len(request) // 24, 0, DOMID_SELF,
                           requests=request))  # fmt: skip
    assert guest.tables.count[both] == pinned


def test_xens_own_memory_is_no_place_for_requests(twins):
    """It is mapped in every guest, for the emulated CPU, and no guest may read it."""
    for guest in twins.guests:
        request = guest.l1 << PAGE_SHIFT | 8 * 9, 0  # a good one
        guest.machine.mem[guest.domain._reserved_gdt, :2] = request
    there = guest.domain.gdt_base(guest.vcpu) + RESERVED_GDT_PAGE * PAGE_SIZE
    twins.do(hypercall(MMU_UPDATE, there, 1, 0, DOMID_SELF))
    assert guest.hv.q[RBX] == -errno.EFAULT & (1 << 64) - 1


def test_usual_crossings_are_the_librarys(twins):
    """And so these are compared indeed: entries changed, address spaces, vCPUs there are not."""
    l1 = twins.guests[0].l1
    page = twins.guests[0].frames[9]
    for value in (0, page << PAGE_SHIFT | FULL, page << PAGE_SHIFT | READ_ONLY):
        request = struct.pack("<QQ", l1 << PAGE_SHIFT | 8 * 9, value)
        twins.do(hypercall(MMU_UPDATE, lambda g: g.va(ARGUMENTS), 1, 0, DOMID_SELF,
                           requests=request))  # fmt: skip
    assert twins.nr_quick() == 3
    for kernel, user in ((32, 33), (34, 35), (34, None), (32, 33)):
        numbers = [twins.guests[0].frames[p] if p else 0 for p in (kernel, user)]
        request = struct.pack("<IIQQIIQQ", 5, 0, numbers[0], 0, 15, 0, numbers[1], 0)
        twins.do(hypercall(MMUEXT_OP, lambda g: g.va(ARGUMENTS), 2, 0, DOMID_SELF,
                           requests=request))  # fmt: skip
        control = twins.guests[0].vcpu.context.ctrlreg
        assert [control[3] >> 12, control[1] >> 12] == numbers
    assert twins.nr_quick() == 7
    twins.do(hypercall(VCPU_OP, 3, 7))
    twins.do(hypercall(0, code=CLI + HYPERCALL[2:]))
    assert twins.nr_quick() == 9
    assert twins.guests[0].hv.q[RBX] == 0


def test_new_entries_of_upper_tables_are_the_librarys(twins):
    """None in the place of none, and a table in use; all else may begin or end one."""
    guest = twins.guests[0]
    for table, target in ((guest.l2, guest.l1), (guest.l3, guest.l2)):
        entries = 0, PTE_RW, target << PAGE_SHIFT | READ_ONLY, target << PAGE_SHIFT | FULL, 0
        for entry, quick in zip(entries, (1, 1, 1, 0, 0), strict=True):
            before = twins.nr_quick()
            request = struct.pack("<QQ", table << PAGE_SHIFT | 8 * 300, entry)
            twins.do(hypercall(MMU_UPDATE, lambda g: g.va(ARGUMENTS), 1, 0, DOMID_SELF,
                               requests=request))  # fmt: skip
            assert guest.hv.q[RBX] == 0
            assert twins.nr_quick() - before == quick


def test_xens_part_of_an_l4_table_is_not_the_guests(twins):
    """Not even to write none over none."""
    guest = twins.guests[0]
    for entry in (0, guest.l3 << PAGE_SHIFT | FULL):
        request = struct.pack("<QQ", guest.l4 << PAGE_SHIFT | 8 * 260, entry)
        twins.do(hypercall(MMU_UPDATE, lambda g: g.va(ARGUMENTS), 1, 0, DOMID_SELF,
                           requests=request))  # fmt: skip
        assert guest.hv.q[RBX] == -errno.EINVAL & (1 << 64) - 1


def only_the_library(twins) -> None:
    """Python is not to be asked for the end of a crossing."""

    def asked(_skip: int) -> None:
        raise AssertionError("Python was asked")

    twins.guests[0].hv.fastpath._leave = asked


@pytest.mark.parametrize("pending", [False, True])
def test_what_a_switch_of_tasks_makes(twins, pending):
    """Its stack, its segments, its timer; an event that comes with it; and back from that."""
    only_the_library(twins)
    changes = [
        hypercall(STACK_SWITCH, 0xE02B, 0x1234000, pending=pending),
        *(hypercall(SET_SEGMENT_BASE, n, 0x777000 + n, pending=pending) for n in (0, 1, 2)),
        hypercall(SET_SEGMENT_BASE, 3, 0, pending=pending),
        hypercall(XEN_VERSION, 0, pending=pending),
        iret(0, 0xE030, 0x246, 0xE02B, stack=0, pending=pending),
        iret(0x100, 0xE030, 0x2, 0xE02B, stack=0),
        hypercall(0, code=CLI + HYPERCALL[2:], pending=pending),
        hypercall(VCPU_OP, 8, 0, lambda g: g.va(ARGUMENTS), pending=pending,
                  requests=struct.pack("<QI", 1 << 62, 0)),
    ]  # fmt: skip
    for nr, change in enumerate(changes, 1):
        twins.do(change)
        assert twins.nr_quick() == nr
        guest = twins.guests[0]
        assert guest.vcpu.info.evtchn_upcall_mask == (pending if nr != 8 else 1)
    context = guest.vcpu.context
    assert (context.kernel_ss, context.kernel_sp) == (0xE02B, 0x1234000)
    assert (guest.hv.q[FS_BASE], guest.hv.q[GS_BASE]) == (0x777000, 0x777002)


@pytest.mark.parametrize(("cs", "rflags"), [(0xE033, 0x202), (0xE030, 0x302)])
def test_other_returns_are_pythons(twins, cs, rflags):
    """To user space, which has tables of its own, and with a single step."""
    twins.do(iret(0, cs, rflags, 0xE02B, stack=0))
    assert twins.nr_quick() == 0


def test_a_step_that_began_ends_in_python(twins):
    """An iret with TF, and behind it one that the library could do: the #DB of neither is lost."""
    step = b"\xb8\x17\x00\x00\x00\x0f\x05"  # mov eax, 23; syscall

    def two(guest: Guest) -> None:
        guest.poke(3, 0, END)
        guest.stops.add(guest.va(3, SYSCALL_IN_END))
        guest.set_handler(1)
        frames = [
            struct.pack("<9Q", IRET, 0, 0, 0, guest.va(0, 5), 0xE030, 0x302, guest.va(8, 72), 0),
            struct.pack("<9Q", 0, 0, 0, 0, guest.va(3), 0xE030, 0x202, guest.va(9), 0),
        ]
        guest.poke(8, 0, b"".join(frames))
        guest.start(step, rsp=guest.va(8))
        guest.hv.run()

    twins.do(two)
    assert twins.guests[0].hv.stopped_at >= 0


@pytest.mark.parametrize("selector", [0, 3, 8, 0x2B, 0x1000, 0x1003, 0x2C, 0xE02B, 0xFFFB])
@pytest.mark.parametrize("entries", [0, 1, 6, 512, 513])
def test_the_segment_of_a_selector(twins, selector, entries):
    """The base of a descriptor that is present; of the first one, too, which should be none. Those
    of an LDT and Xen's own are Python's to look for."""
    for descriptor in (0, 0x00CF73000000FFFF, 0x40F3778899AAFFFF):

        def change(guest: Guest, descriptor: int = descriptor) -> None:
            mfns = guest.unmap(20, 21)[: -(-entries // 512)]
            for mfn in mfns:
                guest.machine.mem[mfn, [0, 1, 5]] = descriptor
            guest.hv.q[GS_SEL] |= 0x13
            assert guest.domain.set_gdt(guest.vcpu, mfns, entries) == 0
            hypercall(0)(guest)  # what was mapped is forgotten
            guest.vcpu.context.gs_base_user = 7
            hypercall(SET_SEGMENT_BASE, 3, selector | 1 << 16)(guest)
            loaded = guest.vcpu.context.gs_base_user
            assert guest.domain.set_gdt(guest.vcpu, [], 0) == 0
            guest.vcpu.context.gs_base_user = loaded

        before = twins.nr_quick()
        twins.do(change)
        assert twins.nr_quick() - before == (selector & 4 == 0 and selector < 0xE000)
        assert twins.guests[0].vcpu.context.gs_base_user != 7


@pytest.mark.parametrize("selector", [0, 0x2B])
def test_a_kernel_that_returns_to_itself_keeps_its_base(twins, selector):
    """Linux does that with an iretq of the CPU's own, for another processor that has changed code,
    and whatever program it has interrupted: with the selector of a 32-bit one, too."""

    def change(guest: Guest) -> None:
        mfns = guest.unmap(20)
        guest.machine.mem[mfns, 5] = 0x00CFF3000000FFFF
        assert guest.domain.set_gdt(guest.vcpu, mfns, 512) == 0
        hypercall(0)(guest)  # what was mapped is forgotten
        hypercall(SET_SEGMENT_BASE, 3, selector)(guest)
        guest.hv.q[GS_BASE] = 0x1111
        assert guest.run(RETURN_TO_SELF, rsp=guest.va(9)) == guest.va(0, len(RETURN_TO_SELF))
        assert (guest.hv.q[GS_SEL] & 0xFFFF, guest.hv.q[GS_BASE]) == (selector, 0x1111)
        assert guest.domain.set_gdt(guest.vcpu, [], 0) == 0

    twins.do(change)


def test_a_mapping_that_is_gone_with_the_address_space_faults(twins):
    """What an entry was is forgotten when an address space is loaded: the store behind faults."""
    guest = twins.guests[0]
    handler = guest.set_handler(14)
    entry = struct.pack("<QQ", guest.l1 << PAGE_SHIFT | 8 * 9, 0)
    base = struct.pack("<IIQQIIQQ", 5, 0, guest.frames[32], 0, 15, 0, 0, 0)
    guest.poke(ARGUMENTS, 0, entry)
    guest.poke(ARGUMENTS, 64, base)
    store = b"\x48\x89\x03"  # mov [rbx], rax
    switch = b"\x48\x89\xef\xbe\x02\x00\x00\x00\xb8\x1a\x00\x00\x00\x0f\x05"
    code = store + b"\xb8\x01\x00\x00\x00\x0f\x05" + store + switch + store
    stopped = guest.run(
        code, rbx=guest.va(9), rdi=guest.va(ARGUMENTS), rbp=guest.va(ARGUMENTS, 64),
        rsi=1, rdx=0, r10=DOMID_SELF,
    )  # fmt: skip
    assert stopped == handler
    assert guest.stacked(4)[3] == guest.va(0, len(code) - len(store))
    assert twins.nr_quick() == 2


def test_user_space_makes_no_hypercalls(twins):
    """A program's `syscall` goes to its kernel, whatever is in its registers."""

    def enter(guest: Guest) -> None:
        guest.vcpu.context.syscall_callback_eip = guest.va(7)
        guest.poke(7, 0, END)
        guest.stops.add(guest.va(7, SYSCALL_IN_END))
        user = guest.frames[33]
        assert guest.tables.get_type(user, PGT_L4) == 0
        guest.vcpu.context.ctrlreg[1] = user << PAGE_SHIFT
        guest.poke(ARGUMENTS, 0, struct.pack("<QQ", guest.l1 << PAGE_SHIFT | 8 * 9, 0))
        guest.start(HYPERCALL, rax=MMU_UPDATE, rdi=guest.va(ARGUMENTS), rsi=1, rdx=0,
                    r10=DOMID_SELF)  # fmt: skip
        guest.hv.toggle(False)
        guest.hv.run()
        assert guest.hv.stopped_at == guest.va(7, SYSCALL_IN_END)
        assert guest.vcpu.in_kernel

    twins.do(enter)
    assert twins.nr_quick() == 0
    assert twins.guests[0].machine.mem[twins.guests[0].l1, 9] & PTE_PRESENT


def test_a_kick_ends_the_run_at_the_next_crossing(twins):
    guest = twins.guests[0]
    guest.poke(ARGUMENTS, 0, struct.pack("<QQ", guest.l1 << PAGE_SHIFT | 8 * 9, 0))
    guest.start(HYPERCALL, rax=MMU_UPDATE, rdi=guest.va(ARGUMENTS), rsi=1, rdx=0, r10=DOMID_SELF)
    guest.hv.kicked = False
    guest.hv.run = lambda: None
    original = guest.hv.fastpath.see

    def kicked_meanwhile(*arguments, **named):
        original(*arguments, **named)
        guest.hv.kick()

    guest.hv.fastpath.see = kicked_meanwhile
    guest.hv._open_fastpath()
    guest.hv.cpu.run()
    assert guest.hv.q[RIP] == guest.va(0, 2)
    assert guest.hv.q[RAX] == 0


def test_a_timer_that_is_due_ends_a_quick_crossing_too(twins):
    """Of a guest that makes no other crossings."""
    guest = twins.guests[0]
    clock = guest.domain.clock = RealClock()
    clock.start()
    guest.vcpu.timer_ns = clock.now() + 20_000_000
    seen = []
    original = guest.domain.run_timers
    guest.domain.run_timers = lambda now: (seen.append(now), original(now), guest.hv.kick())
    # again: mov eax, 24; syscall; jmp again (vcpu_op of a vCPU there is not)
    guest.start(b"\xb8\x18\x00\x00\x00\x0f\x05\xeb\xf7", rdi=3, rsi=7)
    guest.hv.run()
    assert len(seen) == 1
    assert 20_000_000 <= seen[0] < 2_000_000_000
    assert twins.nr_quick() > 100


def test_a_timer_that_the_library_sets_comes(twins):
    """A guest that sets its timer and asks for a vCPU there is not, over and over: when the timer
    is due it is run, and not before."""
    guest = twins.guests[0]
    clock = guest.domain.clock = RealClock(10**9)
    clock.start()
    due = []
    guest.domain.run_timers = lambda now: (due.append((now, guest.vcpu.timer_ns)),
                                           setattr(guest.vcpu, "timer_ns", None),
                                           len(due) == 3 and guest.hv.kick())  # fmt: skip
    code = (
        b"\x4d\x01\x2c\x24"  # again: add [r12], r13
        b"\xb8\x18\x00\x00\x00\xbf\x08\x00\x00\x00\x31\xf6\x4c\x89\xe2\x0f\x05"
        b"\xbb\x40\x0d\x03\x00"  # mov ebx, 200000: longer than the step on any machine
        b"\xb8\x18\x00\x00\x00\xbf\x03\x00\x00\x00\xbe\x07\x00\x00\x00\x0f\x05"  # is up?
        b"\xff\xcb\x75\xeb"  # dec ebx; jnz: ask again
        b"\xeb\xcf"  # jmp again
    )
    step = 5_000_000
    guest.poke(ARGUMENTS, 0, struct.pack("<QI", clock.now(), 0))
    guest.start(code, r12=guest.va(ARGUMENTS), r13=step)
    guest.hv.run()
    assert len(due) == 3
    assert all(0 <= now - timer < 10**9 for now, timer in due)
    assert twins.nr_quick() > 10_000


def test_timers_of_several_vcpus_are_pythons():
    """Their deadline is the earliest of all."""
    machines = Machines()
    try:
        guest = make(machines)
        guest.domain.vcpus.append(guest.domain.vcpus[0])  # as far as the library can see
        request = struct.pack("<QI", 1 << 62, 0)
        hypercall(VCPU_OP, 8, 0, lambda g: g.va(ARGUMENTS), requests=request)(guest)
        assert guest.hv.fastpath.words[NR_CROSSINGS] == 0
        assert guest.vcpu.timer_ns == 1 << 62
    finally:
        machines.close()


@pytest.mark.parametrize("khz", [1_000_000, 2_400_000, 3_999_999])
def test_rdtsc_is_the_domains_clock(twins, khz):
    guest = twins.guests[0]
    clock = guest.domain.clock = RealClock(5 * 10**9, khz)
    clock.start()
    before = clock.rdtsc()
    time.sleep(0.001)
    guest.run(b"\x0f\x31\x89\xc3\xb8\xff\x00\x00\x00")
    tsc = guest.hv.q[RDX] << 32 | guest.hv.q[RBX]
    assert before < tsc <= clock.rdtsc()
    assert tsc - before > khz  # a millisecond's ticks


def test_python_does_it_all_where_there_is_no_library():
    code = "from xsave.guest.xen.fastpath import library; print(library())"
    out = subprocess.run([sys.executable, "-c", code], env={"XSAVE_FASTPATH": "0"}, check=True,
                         capture_output=True, text=True, cwd=SOURCE.parents[2])  # fmt: skip
    assert out.stdout == "None\n"


@pytest.mark.skipif(not all(map(shutil.which, ("gcc", "make"))), reason="no compiler")
def test_the_library_is_what_its_source_says(tmp_path):
    """Its functions do, that is: the same code, whatever compiler made what is shipped."""
    made = subprocess.run(
        ["make", "-s", "-C", SOURCE, f"OUT={tmp_path}"], check=True, capture_output=True, text=True
    )
    assert made.stderr == ""
    shipped, built = (directory / "fastpath.so" for directory in (SOURCE, tmp_path))
    if comment(shipped) == comment(built):
        assert shipped.read_bytes() == built.read_bytes()


def comment(library: Path) -> bytes:
    """The compiler's name and version."""
    content = library.read_bytes()
    at = content.index(b"GCC: ")
    return content[at : content.index(b"\0", at)]
