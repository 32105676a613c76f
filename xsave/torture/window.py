"""The window: every instruction boundary at which a thread is about to change a page table.

From a moment in the life of the workload the guest is led on to where a thread of it makes an
address space (mm_init), and through the whole life of that address space until the thread makes
the next one. Of what the thread executes in between, the window is every boundary inside the
kernel's page-table paths (from __pgtable_text_start to __pgtable_text_end) and in what they call:
from the instruction that enters them until the stack pointer is above where it was there. What
an event handler or another thread executes meanwhile is not the thread's and no point, but it
happens.

Two ways to count them. `walk` executes one instruction at a time and says at each boundary where
the guest is, before it goes on: that is where a suspend is tried. `trace` never stops: it lets
the guest run free and counts what the emulator says it executes.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from xsave.errors import GuestStateError
from xsave.guest.xen.cpuregs import RIP, RSP
from xsave.guest.xen.vcpu import Cpu
from xsave.torture.clockwork import Clockwork
from xsave.torture.symbols import Symbols
from xsave.torture.tasks import Tasks

LIFE_BEGINS = "mm_init"
THREADS = "mmtest/"
#: Longer than any life; a guest that makes no address space in that time is broken.
_LONGEST_LIFE_NS = 60_000_000_000
#: rcx, r11, rip, cs, rflags, rsp, ss: what Xen pushes for an event.
_EVENT_FRAME = struct.Struct("<7Q")
#: Behind the prologue of a function: a frame number is in its hands.
_STEPS_INTO = 12
_POINT, _OTHER, _LEFT = range(3)


@dataclass(frozen=True)
class Point:
    """A boundary: its number in the window, rip, and how deep below the entry it is."""

    index: int
    rip: int
    depth: int


class Gate:
    """The ways into the page-table paths: the first instruction of every function there.

    Installed once, before the guest's code is translated; `see` hears of each entry. Only the
    entries are watched: to be called for every instruction would cost more than to execute it.
    """

    def __init__(self, cpu: Cpu, symbols: Symbols) -> None:
        self.see: Callable[[int], None] | None = None
        first, last = symbols.window
        for address, _ in symbols.code:
            if first <= address <= last:
                cpu.watch(address, address, self._entered)

    def _entered(self, rip: int) -> None:
        if self.see is not None:
            self.see(rip)


class Window:
    """The window of one life on one vCPU. Make it where the search for a life is to begin."""

    def __init__(self, clockwork: Clockwork, symbols: Symbols, gate: Gate, vcpu: int = 0) -> None:
        self._gate = gate
        self._clockwork = clockwork
        self._hv = clockwork.hv
        self._vcpu = vcpu
        self._first, self._last = symbols.window
        self._text = symbols.text
        self._begin = symbols.address[LIFE_BEGINS]
        tasks = Tasks(self._hv, symbols)
        self._stack_bytes = tasks.stack_bytes
        self._blocks = sorted(t.block for t in tasks.tasks)
        self._threads = {t.block for t in tasks.tasks if t.comm.startswith(THREADS)}
        self._thread: int | None = None
        self._lives = 0
        self._armed = True  # the watch ends a run at an entry
        self._entry_rsp = 0
        self._resume: tuple[int, int] | None = None  # where an event interrupted the thread

    # -- one way: instruction by instruction ---

    def walk(self) -> Iterator[Point]:
        """Yield every point, with the guest standing there."""
        index = 0
        for _ in self._entries():
            while (at := self._where(self._hv.q[RIP])) != _LEFT:
                if at == _POINT:
                    yield Point(index, self._hv.q[RIP], self._entry_rsp - self._hv.q[RSP])
                    index += 1
                self._go_on()

    def _go_on(self) -> None:
        if self._hv.vcpu.blocked or self._hv.vcpu.id != self._vcpu:
            self._clockwork.turn()
        else:
            self._clockwork.step()

    def lead_into(self, function: int) -> None:
        """Lead the guest to where a thread of the workload is a few instructions into a function,
        and leave it there."""
        for point in self.walk():
            if point.rip == function:
                for _ in range(_STEPS_INTO):
                    self._clockwork.step()
                return
        raise GuestStateError("no thread of the guest comes there")

    # -- the other: what the emulator executes ---

    def trace(self) -> int:
        """Return the number of points, counted by a guest that is not stopped at any."""
        count, inside, left = 0, False, False

        def see(rip: int) -> None:
            nonlocal count, left
            if not inside:
                return
            at = self._where(rip)
            count += at == _POINT
            if at == _LEFT:
                left = True
                self._hv.cpu.stop()

        end_watch = self._hv.cpu.watch(*self._text, see)
        try:
            for _ in self._entries():
                inside, left = True, False
                while not left:
                    if self._hv.vcpu.blocked or self._hv.vcpu.id != self._vcpu:
                        self._clockwork.turn()
                    else:
                        self._clockwork.run_free()
                inside = False
        finally:
            end_watch()
        return count

    # -- both ---

    def _entries(self) -> Iterator[None]:
        """Lead the guest to each entry into the paths, until another life begins."""

        def see(rip: int) -> None:
            if self._armed and self._is_entry(rip):
                self._hv.cpu.stop()

        self._gate.see = see
        try:
            while self._lead():
                self._armed, self._entry_rsp = False, self._hv.q[RSP]
                yield
                self._armed = True
        finally:
            self._gate.see = None

    def _lead(self) -> bool:
        """Run to the next entry into the paths; False if it begins another life."""
        clockwork, hv = self._clockwork, self._hv
        domain = clockwork.domain
        until = domain.clock.now() + _LONGEST_LIFE_NS
        while domain.clock.now() < until and clockwork.turn():
            if domain.shutdown_reason is not None:
                raise GuestStateError("the guest ended in the window")
            rip = hv.q[RIP]
            if self._first <= rip <= self._last and self._is_entry(rip):
                self._thread = self._block()
                self._lives += rip == self._begin
                return self._lives < 2
        raise GuestStateError("no thread of the guest makes an address space")

    def _is_entry(self, rip: int) -> bool:
        """The CPU is about to enter the paths: by the thread whose life it is, or begins?"""
        if self._hv.vcpu.id != self._vcpu:
            return False
        block = self._block()
        if self._thread is None:
            return block in self._threads and rip == self._begin
        return block == self._thread

    def _block(self) -> int:
        """The memory block of the thread that has the CPU; -1 for one that is not known."""
        below = self._hv.q[RSP] - 1
        i = bisect_right(self._blocks, below) - 1
        return self._blocks[i] if i >= 0 and below < self._blocks[i] + self._stack_bytes else -1

    def _where(self, rip: int) -> int:
        """Say what the boundary before the instruction at rip is."""
        rsp = self._hv.q[RSP]
        if self._resume is not None:
            if (rip, rsp) != self._resume:
                return _OTHER
            self._resume = None
        if self._hv.vcpu.id != self._vcpu or self._block() != self._thread:
            return _OTHER
        if rip == self._hv.vcpu.context.event_callback_eip:
            frame = _EVENT_FRAME.unpack(self._hv.read(rsp, _EVENT_FRAME.size))
            self._resume = (frame[2], frame[5])
            return _OTHER
        return _LEFT if rsp > self._entry_rsp else _POINT
