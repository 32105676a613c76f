"""Where Unicorn keeps the emulated CPU's registers, found once and seen directly.

Unicorn's register calls cost microseconds each, and two things it does not expose at all are
needed at every exception: the #PF error code, and `old_exception`, which must be reset or the
second fault becomes a double fault. So the CPU state structure of the pinned unicorn release is
located in memory by writing a signature to eight registers, and checked. Layout of that release:
16 general registers at 0, rip at 128, hflags at 176, segments of 24 bytes at 184 (selector, base at
+8), cr[] at 424; error_code and old_exception lie at fixed distances before the reset values of dr6
and dr7.
"""

from __future__ import annotations

import ctypes
import os
import struct

from xsave.errors import XsaveError

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R8, R9, R10, R11, R12, R13, R14, R15 = range(8, 16)
RIP = 16
ES_SEL, CS_SEL, SS_SEL, DS_SEL, FS_SEL, GS_SEL = ((184 + 24 * i) >> 3 for i in range(6))
FS_BASE = FS_SEL + 1
GS_BASE = GS_SEL + 1
ES_BASE, CS_BASE, SS_BASE, DS_BASE = ES_SEL + 1, CS_SEL + 1, SS_SEL + 1, DS_SEL + 1
#: Behind the base: limit and, in the upper half, the flags of the descriptor. An iretq empties data
#: segments (their bases too) whose privilege is less than that of who executes it, which is 3.
LIMIT_AND_FLAGS = 2
FLAT_RING3_DATA = 0x00CF_F300_FFFF_FFFF
CR2 = 440 >> 3
CR3 = 448 >> 3
#: A u32 among the state's `d` words: what the translator must know of the mode.
HFLAGS = 176 >> 2
HFLAG_CODE64 = 1 << 15
#: Code and stack of 32 bits (set for 64-bit code too), data segments that do not begin at 0.
HFLAG_CODE32, HFLAG_STACK32, HFLAG_ADD_BASES = 1 << 4, 1 << 5, 1 << 6

_DR_RESET = struct.pack("<QQ", 0xFFFF0FF0, 0x400)
_STATE_BYTES = 16384
_SCAN_ENGINE = 8192
#: Where the CPU object has its pointer to the state (CPUState.env_ptr).
_STATE_POINTER = 296


class UnsupportedEmulator(XsaveError):
    """The installed unicorn is not the release whose layout is known."""


def _read(fd: int, address: int, nr: int) -> bytes:
    try:
        return os.pread(fd, nr, address)
    except (OSError, OverflowError):
        return b""


def locate(engine: int, signature: bytes) -> tuple[int, int]:
    """Return the addresses of the engine's CPU object and of the structure in it that begins with
    `signature`, two pointers away from the engine handle. /proc/self/mem makes a wrong guess an
    error instead of a crash.

    Other objects of the engine's may lead to the state too; it is the CPU object that has the
    pointer at its place, and one alone may. Raises UnsupportedEmulator."""
    fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = [
            (cpu, state)
            for cpu in set(_pointers(_read(fd, engine, _SCAN_ENGINE)))
            for state in _pointers(_read(fd, cpu + _STATE_POINTER, 8))
            if cpu <= state < cpu + 0x40000 and _read(fd, state, len(signature)) == signature
        ]
    finally:
        os.close(fd)
    if len(found) != 1:
        raise UnsupportedEmulator("this unicorn keeps its CPU state elsewhere (2.1.4 is known)")
    return found[0]


def engine_bytes(engine: int) -> bytes:
    """Return what the engine's own structure looks like now."""
    fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read(fd, engine, _SCAN_ENGINE) or _read(fd, engine, 4096)
    finally:
        os.close(fd)


def _pointers(blob: bytes) -> list[int]:
    nr = len(blob) // 8
    return [p for p in struct.unpack_from(f"<{nr}Q", blob) if 0x10000 < p < 1 << 47]


class CpuState:
    """Direct views of the CPU state: `q` as u64 words, `d` as u32 words."""

    def __init__(self, address: int) -> None:
        raw = (ctypes.c_uint64 * (_STATE_BYTES // 8)).from_address(address)
        view = memoryview(raw).cast("B")
        self.q = view.cast("Q")
        self.d = view.cast("I")
        self.address = address
        at = bytes(view).find(_DR_RESET)
        error_code = at - 48 - 16
        self._error = error_code >> 2
        self._old = (error_code + 112) >> 2
        if at < 0 or self.d[self._old] != 0xFFFFFFFF:
            raise UnsupportedEmulator("the CPU state of this unicorn release has another layout")

    def exception_addresses(self) -> tuple[int, int]:
        """Return where the error code, with `an int raised it` behind it, and old_exception are."""
        return self.address + 4 * self._error, self.address + 4 * self._old

    def take_exception(self) -> tuple[int, bool]:
        """Return the pending exception's error code, and whether an `int` instruction raised it;
        forget the exception."""
        self.d[self._old] = 0xFFFFFFFF
        return self.d[self._error], bool(self.d[self._error + 1])
