"""How a guest that runs in the emulator is stopped, without its code looking for it at every block.

As Unicorn comes, every translated block begins with a call that looks whether a stop is wanted, and
every memory access is followed by one: a third to a half of the time that busy code takes. Both
can be turned off in the pinned release:

* `no_exit_request`, a flag in the engine made for ARM's IT blocks: while it is set, nothing looks
  behind a memory access. There a stop goes back to the instruction's beginning, and an
  `add [m], 1` that has already stored is executed again: with the flag a stop is exact.
* the properties of the helper function that looks (TCGHelperInfo). A helper without side effects
  whose result nobody uses is not called: the translator drops it.

Then code goes on for as long as it stays among blocks that are linked to each other. Hooks end it
at their crossing as ever: they come with an exit to the engine's main loop, which does look. For
what does not cross, another thread interrupts:

1. Blocks are linked to others of their own page only; calls, returns and other pages are looked up.
   With another `cluster_index` in the CPU object no look-up finds a block, and the main loop is
   where that ends, at an exact instruction.
2. What has spent time on the processor since and goes on is a loop in one page: the links of its
   blocks are cut (blocks.py), and before the next run they are forgotten, so that what is
   translated then is linked again.

The page is the one rip is in, which every look-up and every exit stores, or the one behind it,
where a block that crosses into that may have led: no block of two pages is ever linked to. A guest
that has changed the mapping of the code that it executes, and did not flush, is in neither: where
that did not help, the links of all blocks are cut.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Iterable
from functools import cache
from types import CodeType

from xsave.guest.xen.blocks import Blocks
from xsave.guest.xen.cpuregs import UnsupportedEmulator, engine_bytes

#: CPU time in which whatever is not such a loop comes to a look-up.
_PATIENCE_NS = 500_000
#: CPU time in which a loop in rip's page has ended.
_LONG_PATIENCE_NS = 20_000_000
#: So many times it must have been seen to execute code then: at the end of a hook it is once.
_NR_LOOPING = 5
#: Where the CPU object has its `cluster_index`, and what is there: UNASSIGNED_CLUSTER_INDEX.
_CLUSTER_INDEX = 0x8A50 - 0x8BC
_NO_CLUSTER, _NR_NOWHERE = 0xFFFFFFFF, 0xFE
_HELPER = "helper_check_exit_request_x86_64"
_HELPER_NAME = b"check_exit_request"
_FLAGS_AT = 16  # in struct TCGHelperInfo: func, name, flags, sizemask
#: TCG_CALL_NO_READ_GLOBALS, NO_WRITE_GLOBALS and NO_SIDE_EFFECTS.
_PURE = 7


# struct uc_context in front of the registers; then cpu_context_size, 4 bytes of padding, next_pc.
_CONTEXT_HEADER_BYTES = 40
_STOP_FLAGS_AFTER = 16
_STOP_FLAGS = (b"\0\0\0\x01", b"\0\x01\0\x01")


class Stops:
    """The stops of one engine, whose CPU object is at `cpu`."""

    def __init__(
        self, library: ctypes.PyDLL, engine: int, cpu: int, context_bytes: int, run: CodeType
    ) -> None:
        """run: what the thread that runs the guest executes while no hook does."""
        self._engine = engine
        self._run = run
        self._helper = _helper_flags(library._name)
        self._blocks = Blocks(library, engine, cpu)
        self.block_cache = self._blocks.cache
        self._stop = library.uc_emu_stop
        self._stop.argtypes, self._stop.restype = [ctypes.c_void_p], None
        flag = locate_stop_flag(engine, context_bytes)
        self._no_exit_request = ctypes.c_uint8.from_address(flag)
        self._cluster = ctypes.c_uint32.from_address(cpu + _CLUSTER_INDEX)
        if self._cluster.value != _NO_CLUSTER:
            raise UnsupportedEmulator("the CPU object of this unicorn has another layout")
        self._nowhere = 0
        self._asked_ns: int | None = None
        self._nr_looping = 0
        self._cut: set[int] = set()
        self._thread = -1
        self._clock: int | None = None  # of the thread that ran last

    def begin(self, *, looking: bool) -> None:
        """Before a run, in the thread that will run: what is translated from here on looks for a
        stop at every instruction, or never. (What was translated before stays as it is.)"""
        self._no_exit_request.value = 0 if looking else 1
        self._helper.set(0 if looking else _PURE)
        self._cluster.value, self._asked_ns, self._nr_looping = _NO_CLUSTER, None, 0
        if (thread := threading.get_ident()) != self._thread:
            self._thread, self._clock = thread, time.pthread_getcpuclockid(thread)
        while self._cut:
            self._blocks.forget(self._cut.pop())

    def stop(self) -> None:
        """End the run at this crossing, from a hook. From elsewhere: when it comes to the next."""
        self._stop(self._engine)

    def stop_before(self, address: int) -> None:
        """End the run before the first instruction of the block at this address, of which the
        engine is telling that it is new. The block is of no use afterwards."""
        self._blocks.bar(address)
        self._stop(self._engine)

    def interrupt(self, pages: Iterable[int]) -> None:
        """End a run from another thread, between two blocks. To be called again and again, until it
        has ended; in between, the thread that runs may not begin another run.

        pages: machine addresses of the pages that code at rip may be in; asked for if needed."""
        if self._clock is None:  # the first run has not begun yet
            return
        self._stop(self._engine)
        # Never the same twice in a row: what the main loop, behind its look for a stop, had just
        # begun to translate when this changed belongs to the one before, and finds itself there.
        self._nowhere = self._nowhere % _NR_NOWHERE + 1
        self._cluster.value = self._nowhere
        spent_ns = time.clock_gettime_ns(self._clock)
        if self._asked_ns is None:
            self._asked_ns = spent_ns
        elif spent_ns - self._asked_ns > _PATIENCE_NS:
            # All code is dear to translate again: not for time that a hook takes (some import).
            self._nr_looping += not self._is_in_hook()
            long = spent_ns - self._asked_ns > _LONG_PATIENCE_NS
            if long and self._nr_looping >= _NR_LOOPING:
                pages = self._blocks.pages()
            for page in pages:
                self._cut.add(page)
                self._blocks.cut(page)

    def _is_in_hook(self) -> bool:
        """True if the guest stands still, while Python does something for it."""
        frame = sys._current_frames().get(self._thread)
        return frame is not None and frame.f_code is not self._run


class _HelperFlags:
    """The properties of a helper function, which lie in the library's read-only data: they are
    the same for all engines of this process."""

    def __init__(self, address: int) -> None:
        self._flags = ctypes.c_uint32.from_address(address)
        libc = ctypes.CDLL(None, use_errno=True)
        self._page = address & -mmap.PAGESIZE
        libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._mprotect = libc.mprotect

    def set(self, flags: int) -> None:
        if self._flags.value != flags:
            self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
            self._flags.value = flags
            self._protect(mmap.PROT_READ)

    def _protect(self, protection: int) -> None:
        if self._mprotect(self._page, mmap.PAGESIZE, protection):
            error = os.strerror(ctypes.get_errno())
            raise UnsupportedEmulator(f"the emulator's data cannot be changed: {error}")


@cache
def _helper_flags(library: str) -> _HelperFlags:
    """Find the one TCGHelperInfo of the function that looks. Raises UnsupportedEmulator."""
    function = ctypes.cast(getattr(ctypes.PyDLL(library), _HELPER), ctypes.c_void_p).value or 0
    wanted, found = struct.pack("<Q", function), []
    with open("/proc/self/mem", "rb", 0) as memory, open("/proc/self/maps") as maps:  # noqa: PTH123
        for line in maps:
            area, permissions, *_, path = line.split(maxsplit=5)
            if permissions != "r--p" or "libunicorn" not in path:
                continue
            first, last = (int(end, 16) for end in area.split("-"))
            blob = os.pread(memory.fileno(), last - first, first)
            at = blob.find(wanted)
            while at >= 0:
                if _has_name(memory.fileno(), blob[at + 8 : at + 16]):
                    found.append(first + at + _FLAGS_AT)
                at = blob.find(wanted, at + 1)
    if len(found) != 1 or ctypes.c_uint32.from_address(found[0]).value not in (0, _PURE):
        raise UnsupportedEmulator("this unicorn has its helpers elsewhere (2.1.4 is known)")
    return _HelperFlags(found[0])


def _has_name(memory: int, pointer: bytes) -> bool:
    try:
        return os.pread(memory, len(_HELPER_NAME), struct.unpack("<Q", pointer)[0]) == _HELPER_NAME
    except (OSError, OverflowError, struct.error):
        return False


def locate_stop_flag(engine: int, context_bytes: int) -> int:
    """Return the address of `no_exit_request`, of an engine that has not run yet.

    It is the third of {hook_insert, first_tb, no_exit_request, init_done}, behind next_pc and the
    size of a context, which uc_context_size() tells. Raises UnsupportedEmulator."""
    blob = engine_bytes(engine)
    size = struct.pack("<I", context_bytes - _CONTEXT_HEADER_BYTES)
    found = [
        at + _STOP_FLAGS_AFTER + 2
        for at in range(0, len(blob) - 24, 8)
        if blob[at : at + 4] == size and blob[at + _STOP_FLAGS_AFTER :][:4] in _STOP_FLAGS
    ]
    if len(found) != 1:
        raise UnsupportedEmulator("this unicorn keeps its stop flag elsewhere (2.1.4 is known)")
    return engine + found[0]
