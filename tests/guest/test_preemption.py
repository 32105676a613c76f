"""Hypercalls of many steps: who waits gets the vCPU between two of them, the guest sees nothing.

The guest is a real one: it executes `syscall`, and goes on behind it when all steps are done.
"""

from __future__ import annotations

import itertools
import struct

import pytest

from tests.guest.rig import FULL, Guest
from xsave.guest.xen.cpuregs import R10, RAX, RBX, RDI, RDX, RIP, RSI
from xsave.guest.xen.time import RealClock

SELF = 0x7FF0
MMU_UPDATE, MULTICALL, XEN_VERSION, MMUEXT_OP = 1, 13, 17, 26
REQUESTS, CALLS, DONE = 4, 8, 12  # pages
NR = 700
SYSCALL = b"\x0f\x05"


@pytest.fixture
def guest(machine):
    """A guest of 20 pages."""
    return Guest(machine, 20)


def every(hv, nth):
    """Let somebody want the vCPU at each nth step, and count how often that was."""
    steps, preemptions = itertools.count(1), []

    def preempted():
        if next(steps) % nth:
            return False
        preemptions.append(hv.nr_crossings)
        return True

    hv.preempted = preempted
    return preemptions


def put_requests(guest, nr=NR):
    """Requests that give the first slots of the L1 behind its entries in use other frames."""
    slots = range(40, 512)
    requests = [
        (guest.l1 << 12 | 8 * slots[i % len(slots)], guest.frames[i % 4] << 12 | FULL)
        for i in range(nr)
    ]
    packed = b"".join(struct.pack("<QQ", *request) for request in requests)
    for page in range(-(-len(packed) // 4096)):
        guest.poke(REQUESTS + page, 0, packed[4096 * page : 4096 * (page + 1)])
    return dict(requests)


def written(guest, expected):
    return {address: int(guest.machine.mem.reshape(-1)[address >> 3]) for address in expected}


@pytest.mark.parametrize("nth", [1, 2, 97])
def test_a_batch_is_preempted_and_goes_on(guest, nth):
    """mmu_update with somebody waiting at each nth request: every entry is written, the result and
    the count are those of one call, and no register changes that would not have anyway."""
    expected = put_requests(guest)
    guest.power_on()
    preemptions = every(guest.hv, nth)
    others = {"rbx": 0x1234, "r9": 77, "r12": 5}
    stopped = guest.run(
        SYSCALL, rax=MMU_UPDATE, rdi=guest.va(REQUESTS), rsi=NR, rdx=guest.va(DONE), r10=SELF,
        **others,
    )  # fmt: skip
    assert stopped == guest.va(0, 2)
    q = guest.hv.q
    assert (q[RAX], q[RBX], q[RDX], q[R10]) == (0, 0x1234, guest.va(DONE), SELF)
    assert guest.peek(DONE, 0, 4) == struct.pack("<I", NR)
    assert written(guest, expected) == expected
    assert len(preemptions) >= NR // (nth + 1)


def test_a_failing_request_behind_a_preemption(guest):
    """The error of a request is the call's result, and the count is of all before it."""
    put_requests(guest)
    guest.poke(REQUESTS + 1, 0, struct.pack("<QQ", guest.l1 << 12, guest.l4 << 12 | FULL))
    guest.power_on()
    every(guest.hv, 10)
    guest.run(SYSCALL, rax=MMU_UPDATE, rdi=guest.va(REQUESTS), rsi=NR, rdx=guest.va(DONE), r10=SELF)
    assert guest.hv.q[RAX] == (1 << 64) - 16
    assert guest.peek(DONE, 0, 4) == struct.pack("<I", 256)


@pytest.mark.parametrize("nth", [1, 3, 50])
def test_a_multicall_of_batches(guest, nth):
    """A multicall is preempted between its calls and inside of them; each result is its call's."""
    expected = put_requests(guest)
    batch = struct.pack("<8Q", MMU_UPDATE, 9, guest.va(REQUESTS), NR, guest.va(DONE), SELF, 0, 0)
    version = struct.pack("<8Q", XEN_VERSION, 9, 7, 0, 0, 0, 0, 0)
    guest.poke(CALLS, 0, version + batch + version + batch)
    guest.power_on()
    preemptions = every(guest.hv, nth)
    assert guest.run(SYSCALL, rax=MULTICALL, rdi=guest.va(CALLS), rsi=4) == guest.va(0, 2)
    assert guest.hv.q[RAX] == 0
    results = [struct.unpack("<Q", guest.peek(CALLS, 64 * i + 8, 8))[0] for i in range(4)]
    assert results == [4096, 0, 4096, 0]
    assert guest.peek(DONE, 0, 4) == struct.pack("<I", NR)
    assert written(guest, expected) == expected
    assert preemptions


def test_mmuext_op_is_preempted(guest):
    """The same of mmuext_op: pages are cleared one by one."""
    ops = b"".join(struct.pack("<IIQQ", 16, 0, guest.frames[5 + i % 3], 0) for i in range(150))
    guest.poke(REQUESTS + 10, 0, ops)
    guest.poke(7, 0, b"x" * 4096)
    guest.power_on()
    preemptions = every(guest.hv, 4)
    guest.run(SYSCALL, rax=MMUEXT_OP, rdi=guest.va(14), rsi=150, rdx=guest.va(DONE), r10=SELF)
    assert guest.hv.q[RAX] == 0
    assert guest.peek(DONE, 0, 4) == struct.pack("<I", 150)
    assert not any(guest.peek(7, 0, 4096))
    assert preemptions


def test_a_kick_ends_the_run_inside_a_batch(guest):
    """kick() ends the run in the middle of a batch, at the `syscall` instruction with the rest as
    its arguments; the next run does the rest."""
    expected = put_requests(guest)
    guest.power_on()
    real = guest.tables.mmu_update

    def update(*arguments, **options):
        guest.hv.kick()
        return real(*arguments, **options)

    guest.tables.mmu_update = update
    guest.run(SYSCALL, rax=MMU_UPDATE, rdi=guest.va(REQUESTS), rsi=NR, rdx=guest.va(DONE), r10=SELF)
    q = guest.hv.q
    assert (q[RIP], q[RAX], q[RDI]) == (guest.va(0), MMU_UPDATE, guest.va(REQUESTS) + 16)
    assert q[RSI] == NR - 1 | 1 << 31
    assert guest.peek(DONE, 0, 4) == struct.pack("<I", 1)
    guest.tables.mmu_update = real
    guest.hv.run()
    assert guest.hv.stopped_at == guest.va(0, 2)
    assert guest.peek(DONE, 0, 4) == struct.pack("<I", NR)
    assert written(guest, expected) == expected


def test_virtual_time_preempts_by_itself(guest):
    """A guest in virtual time is preempted every 4096 steps, as nothing real may matter to it; one
    in real time only if somebody waits."""
    hv = guest.hv
    assert [hv.preempted() for _ in range(4097)].count(True) == 2
    hv.kicked = False
    guest.domain.clock = RealClock()
    assert not any(hv.preempted() for _ in range(10000))


# -- trees of page tables, which are validated and given up step by step ---

PIN_L4, UNPIN = 3, 4


@pytest.fixture
def tree(guest):
    """A tree of an L4, two L3, six L2 and as many L1 tables, in frames of the guest's beside those
    it has mapped; (the L4, all of them)."""
    machine = guest.machine
    frames = [int(mfn) for mfn in machine.allocate(guest.domain.domid, 15)]
    l4, l3s, l2s, l1s = frames[0], frames[1:3], frames[3:9], frames[9:15]
    for i, l3 in enumerate(l3s):
        machine.mem[l4, i] = l3 << 12 | FULL
        for j, l2 in enumerate(l2s[3 * i : 3 * i + 3]):
            machine.mem[l3, j] = l2 << 12 | FULL
    for l2, l1 in zip(l2s, l1s, strict=True):
        machine.mem[l2, 7] = machine.mem[l2, 9] = l1 << 12 | FULL
        machine.mem[l1, 0] = guest.frames[15] << 12 | FULL
    return l4, frames


def counts(guest, frames):
    """Type, type count and references of frames."""
    machine = guest.machine
    return [
        (int(machine.page_type[m]), int(machine.type_count[m]), int(machine.refs[m]))
        for m in [*frames, guest.frames[15]]
    ]


def ask(guest, command, mfn):
    """One mmuext_op by a `syscall` of the guest; its result."""
    guest.poke(REQUESTS, 0, struct.pack("<IIQQ", command, 0, mfn, 0))
    guest.run(SYSCALL, rax=MMUEXT_OP, rdi=guest.va(REQUESTS), rsi=1, rdx=guest.va(DONE), r10=SELF)
    result = guest.hv.q[RAX]
    return result - (result >> 63 << 64)


def test_a_tree_is_pinned_and_unpinned_step_by_step(guest, tree):
    """With somebody waiting all the time, a tree is validated in as many steps as it has tables,
    to the same counts as at one stroke, and is given up again in as many, to none."""
    l4, frames = tree
    nothing = counts(guest, frames)
    guest.power_on()
    assert ask(guest, PIN_L4, l4) == 0
    pinned = counts(guest, frames)
    assert ask(guest, UNPIN, l4) == 0
    assert counts(guest, frames) == nothing
    preemptions = every(guest.hv, 1)
    assert ask(guest, PIN_L4, l4) == 0
    assert len(preemptions) >= 5  # the six L2 tables, and never before the first
    assert counts(guest, frames) == pinned
    assert ask(guest, UNPIN, l4) == 0
    assert len(preemptions) >= 5 + 8
    assert counts(guest, frames) == nothing
    assert not guest.tables.unfinished
    assert not guest.tables.progress.kept


def test_a_tree_with_an_error_at_its_end(guest, tree):
    """An entry that is refused in the last table: the error comes through all preemptions, and
    nothing stays of what was validated before."""
    l4, frames = tree
    nothing = counts(guest, frames)
    guest.machine.mem[frames[8], 9] = guest.machine.nr_frames << 12 | FULL
    guest.power_on()
    preemptions = every(guest.hv, 1)
    assert ask(guest, PIN_L4, l4) == -22
    assert preemptions
    assert counts(guest, frames) == nothing
    assert not guest.tables.unfinished
    assert not guest.tables.progress.kept


def test_a_tree_changed_between_two_steps(guest, tree):
    """A guest that never goes on with the pin it began: what had been validated for it can be
    mapped writable again after any other request."""
    l4, frames = tree
    nothing = counts(guest, frames)
    tables = guest.tables
    assert tables.attempt(lambda: True, lambda: tables.pin(l4, 4)) == -85
    kept = list(tables.progress.kept)
    assert kept
    assert not tables.pinned[l4]
    assert tables.get_type(kept[0], 5) == -22
    guest.machine.mem[l4] = 0
    assert tables.attempt(lambda: False, lambda: 0) == 0
    assert counts(guest, frames) == nothing
    assert tables.get_type(kept[0], 5) == 0


def test_a_dying_table_is_nobodys(guest, tree):
    """A table that has not given up everything yet can be used as nothing: not as the table it
    was, not as another, not writable, nor be written to."""
    l4, _ = tree
    tables = guest.tables
    assert tables.pin(l4, 4) == 0
    tables.attempt(lambda: True, lambda: tables.unpin(l4))
    assert tables.unfinished
    dying, level = tables.progress.dying[-1]
    for want in (level, 1, 2, 3, 4, 5, 6):
        assert tables.get_type(dying, want) == -22
    assert tables.pin(dying, level) == -22
    assert tables.mmu_update(dying << 12, 0) == -22
    assert tables.attempt(lambda: False, lambda: 0) == 0
    assert tables.get_type(dying, 5) == 0
