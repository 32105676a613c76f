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
