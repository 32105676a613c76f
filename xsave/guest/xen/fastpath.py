"""Crossings that a small library answers without Python (xsave/guest/fastpath).

A crossing takes Python 10 to 40 us, most of it its own; Linux makes 130,000 while it boots, nearly
all of a few kinds. The library's functions are the emulator's hooks then. They know the domain by
a structure that is kept true here: Python sees every crossing that changes anything of it, and
tells the library before the guest goes on (`see`).

Real time only: what a deterministic guest does is told by its crossings, one by one, and tests look
into them. Where the library cannot be loaded (another processor), or XSAVE_FASTPATH=0 says so,
Python does everything.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from xsave.guest.xen.cpuid import XEN_VERSION
from xsave.guest.xen.machine import Machine
from xsave.guest.xen.time import RealClock
from xsave.public import VcpuGuestContext, VcpuInfo

VARIABLE = "XSAVE_FASTPATH"
_LIBRARY = Path(__file__).parents[1] / "fastpath" / "fastpath.so"
NEVER = (1 << 64) - 1

#: What the emulator calls: (engine, data) and (engine, vector, data); and the end of a crossing.
SyscallHook = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
ExceptionHook = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
LeaveHook = ctypes.CFUNCTYPE(None, ctypes.c_uint64)
_POINTERS = (
    "registers", "exception", "old_exception", "cpu",
    "tlb_flush", "tlb", "block_cache", "read_register", "write_register", "clock_gettime",
    "slow_syscall", "slow_exception", "leave",
    "memory", "owner", "page_type", "type_count", "references",
)  # fmt: skip
_WORDS = (
    "nr_frames", "domid", "unflushed",
    "open", "in_kernel", "control_registers", "events", "nr_vcpus", "version", "clock_offset",
    "khz", "timer", "deadline", "kicked", "nr_crossings", "nr_stale",
)  # fmt: skip
_MOST_STALE = 16


class _Structure(ctypes.Structure):
    """struct fastpath."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in _POINTERS + _WORDS),
        ("stale", ctypes.c_uint64 * _MOST_STALE),
    )


_OPEN, _IN_KERNEL, _CONTROL, _EVENTS, _TIMER, _DEADLINE, KICKED, NR_CROSSINGS = (
    getattr(_Structure, name).offset // 8
    for name in (
        "open", "in_kernel", "control_registers", "events", "timer", "deadline", "kicked",
        "nr_crossings",
    )
)  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """Return the library, None if it is not for this machine or unwanted."""
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        found = ctypes.CDLL(str(_LIBRARY))
        nr_bytes = ctypes.c_uint64.in_dll(found, "fastpath_bytes").value
    except (OSError, ValueError):
        return None
    return found if nr_bytes == ctypes.sizeof(_Structure) else None


class Fastpath:
    """What the library knows of one domain. `words` are shared with it, by the indices above."""

    def __init__(
        self,
        machine: Machine,
        domid: int,
        unflushed: ctypes.Array[Any],
        leave: Callable[[int], None],
    ) -> None:
        """leave(skip) ends a crossing that something is due in."""
        self._leave = leave
        self._structure = _Structure()
        self.words = memoryview(self._structure).cast("B").cast("Q")
        self._kept: list[Any] = [machine, unflushed]  # what is known by its address only
        self._context: VcpuGuestContext | None = None
        self._info: VcpuInfo | None = None
        self.active = False
        for field, column in (
            ("memory", machine.mem), ("owner", machine.owner), ("page_type", machine.page_type),
            ("type_count", machine.type_count), ("references", machine.refs),
        ):  # fmt: skip
            setattr(self._structure, field, column.ctypes.data)
        self._structure.nr_frames, self._structure.domid = machine.nr_frames, domid
        self._structure.version = XEN_VERSION[0] << 16 | XEN_VERSION[1]
        self._structure.unflushed = ctypes.addressof(unflushed)

    def connect(
        self,
        registers: int,
        exception: int,
        old_exception: int,
        cpu: int,
        tlb: int,
        block_cache: int,
        functions: tuple[Any, Any, Any],
        slow: tuple[Any, Any],
        fail: Callable[[BaseException], None],
    ) -> tuple[int, int, int]:
        """Return the addresses of the hooks of `syscall` and of exceptions, and of their data.

        registers, exception (the error code), old_exception, cpu, tlb, block_cache: addresses in
        the emulator.
        functions: its tlb_flush, uc_reg_read and uc_reg_write. slow: hooks for what is Python's, a
        SyscallHook and an ExceptionHook. fail ends the run with what was raised."""
        found, s = library(), self._structure
        assert found is not None
        clock_gettime = ctypes.CDLL(None).clock_gettime

        def leave(skip: int) -> None:
            try:
                self._leave(skip)
            except BaseException as e:  # noqa: BLE001 - run() raises it
                fail(e)

        hook = LeaveHook(leave)
        self._kept += [clock_gettime, hook, *slow, *functions]
        s.registers, s.exception, s.old_exception = registers, exception, old_exception
        s.cpu, s.clock_gettime = cpu, _address(clock_gettime)
        s.tlb, s.block_cache = tlb, block_cache
        s.tlb_flush, s.read_register, s.write_register = map(_address, functions)
        s.slow_syscall, s.slow_exception = _address(slow[0]), _address(slow[1])
        s.leave = _address(hook)
        self.active = True
        return (
            _address(found.fastpath_syscall),
            _address(found.fastpath_exception),
            ctypes.addressof(s),
        )

    def begin(self, nr_vcpus: int, clock: RealClock) -> None:
        """Before a run, when the clock goes."""
        self._structure.nr_vcpus, self._structure.khz = nr_vcpus, clock.khz
        self._structure.clock_offset = clock.offset_ns & NEVER
        self._context = self._info = None

    def see(
        self,
        context: VcpuGuestContext,
        info: VcpuInfo,
        timer: ctypes.Array[Any],
        *,
        in_kernel: bool,
        deadline: int,
    ) -> None:
        """Before the guest goes on: which vCPU does, and in which mode. deadline: by the monotonic
        clock, when a timer is due."""
        words = self.words
        if context is not self._context or info is not self._info:
            self._context, self._info = context, info
            words[_CONTROL] = ctypes.addressof(context.ctrlreg)
            words[_EVENTS] = ctypes.addressof(info)
            words[_TIMER] = ctypes.addressof(timer)
        words[_IN_KERNEL] = in_kernel
        words[_DEADLINE] = deadline
        words[_OPEN] = 1

    def close(self) -> None:
        """Leave everything to Python, until `see`."""
        self.words[_OPEN] = 0


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
