"""The emulator's TLB at one size: what a guest sees of it then follows from the guest alone.

A guest does see its TLB: a page made writable faults once more or does not, and an accessed or
dirty bit that was cleared is set again or is not, depending on whether the old translation was
still there. Unicorn's TLB, direct-mapped with 8 victims, depends on nothing but the addresses used,
except for its size: a flush doubles it if most of it was used, and shrinks it to what was used
within the last 100 ms or more of the *host's* clock (tlb_mmu_resize_locked in
qemu/accel/tcg/cputlb.c of unicorn 2.1.4).

A flush that finds no entry counted as used, in a window that never ends, keeps the size. Layout
(CPUTLB in qemu/include/exec/cpu-defs.h; it ends 16 bytes before the CPU state): 32 bytes of
counters; for each of three modes {large_page_addr, large_page_mask, window_begin_ns,
window_max_entries, n_used_entries, vindex, 8 victims of 64 + 16 bytes, iotlb}; 8 bytes; for each
mode {(entries - 1) << 6, table}.
"""

from __future__ import annotations

import ctypes

from xsave.guest.xen.cpuregs import UnsupportedEmulator

#: What the emulator begins with.
ENTRIES = 256
_ENTRY_BITS = 6
_MODES = 3
_DESCRIPTOR_WORDS = 6 + 8 * (64 + 16) // 8 + 1
_WINDOW_BEGIN, _USED = 2, 4
_SIZES = _MODES * _DESCRIPTOR_WORDS + 1
_WORDS = _SIZES + 2 * _MODES + 2
_COUNTERS_BYTES = 32
_NO_PAGE = (1 << 64) - 1
#: In ns since 1970, as windows are: the year 2116.
_NEVER = 1 << 62


class Tlb:
    """The TLB of an engine that has not run yet."""

    def __init__(self, state: int, *, fixed: bool) -> None:
        """state: the address of the CPU state. fixed: at one size, if hold() is called before every
        flush. Raises UnsupportedEmulator."""
        self.fixed, self.address = fixed, state - 8 * _WORDS - _COUNTERS_BYTES
        raw = (ctypes.c_uint64 * _WORDS).from_address(state - 8 * _WORDS)
        self._words = words = memoryview(raw).cast("B").cast("Q")
        modes = [mode * _DESCRIPTOR_WORDS for mode in range(_MODES)]
        fresh = [_NO_PAGE, _NO_PAGE, words[_WINDOW_BEGIN], 0, 0, 0]
        if self.entries() != [ENTRIES] * _MODES or any(
            words[at : at + len(fresh)].tolist() != fresh for at in modes
        ):
            raise UnsupportedEmulator("this unicorn keeps its TLB elsewhere (2.1.4 is known)")
        for at in modes if fixed else []:
            words[at + _WINDOW_BEGIN] = _NEVER
        self._used = [at + _USED for at in modes]

    def entries(self) -> list[int]:
        """Return the size in each mode."""
        return [(self._words[_SIZES + 2 * mode] >> _ENTRY_BITS) + 1 for mode in range(_MODES)]

    def hold(self) -> None:
        """Have the flush that comes next keep the size."""
        words = self._words
        for used in self._used:
            words[used] = 0
