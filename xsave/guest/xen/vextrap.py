"""VEX-coded instructions, which Unicorn executes wrongly, found before they run.

Unicorn 2.1.4 takes the 128-bit VEX forms of SSE instructions for the old ones: the third operand is
lost, and nobody is told. No feature bit keeps its translator from that. But it tells of each block
that it has translated and that no earlier one led to yet, before it runs (UC_HOOK_EDGE_GENERATED),
and a run can be ended there before the block's first instruction. So the code of new blocks is
looked at, and a run ends before one that has such an instruction. Whoever runs the CPU
then has what is before it in the block executed by count, raises #UD, and drops the translation:
the block is new, and found, each time.

A look costs some 4 us, and a kernel that is booting has 60,000 blocks. Kernels believe CPUID, so
only the lower half of the address space is looked at, programs', unless the guest was promised AVX.

The few VEX-coded instructions on general registers (BMI) are executed rightly, where the guest was
promised them.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from typing import Any

_MAP_BYTES = bytes(b for b in range(256) if 1 <= b & 31 <= 3)
# Opcodes of map 1 that have a VEX form, and those of AVX-512's mask registers.
_OPCODES = (
    *range(0x10, 0x18), *range(0x28, 0x30), *range(0x41, 0x4C), *range(0x50, 0x80),
    *range(0x90, 0x94), 0x98, 0x99, 0xAE, 0xC2, *range(0xC4, 0xC7), *range(0xD0, 0x100),
)  # fmt: skip
#: What may be a VEX prefix, to spare most blocks being disassembled.
_SUSPECT = re.compile(
    b"\xc4[" + re.escape(_MAP_BYTES) + b"]|\xc5.[" + re.escape(bytes(_OPCODES)) + b"]", re.DOTALL
)
#: The last address of programs.
USER_END = (1 << 47) - 1
_LEGACY_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x67")
_GENERAL = {2: frozenset((0xF2, 0xF3, 0xF5, 0xF6, 0xF7)), 3: frozenset((0xF0,))}


class _Block(ctypes.Structure):
    """uc_tb: address of the first instruction, number of instructions, bytes."""

    _fields_ = (("pc", ctypes.c_uint64), ("icount", ctypes.c_uint16), ("size", ctypes.c_uint16))


_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(_Block), ctypes.c_void_p, ctypes.c_void_p
)


def prepare() -> None:
    """Load in advance what the first suspicious code needs, for tens of milliseconds."""
    _decoder(False)


@cache
def _decoder(compat: bool) -> Any:
    import capstone  # the built-in guest has none

    mode = capstone.CS_MODE_32 if compat else capstone.CS_MODE_64
    decoder = capstone.Cs(capstone.CS_ARCH_X86, mode)
    decoder.skipdata = True
    return decoder


def is_vex(code: bytes, *, compat: bool) -> bool:
    """True if this instruction is VEX-coded and not on general registers."""
    at = 0
    while code[at] in _LEGACY_PREFIXES and at < len(code) - 1:
        at += 1
    rest = code[at:]
    if rest[0] not in (0xC4, 0xC5) or len(rest) < 3 or (compat and rest[1] & 0xC0 != 0xC0):
        return False
    return rest[0] == 0xC5 or len(rest) < 4 or rest[3] not in _GENERAL.get(rest[1] & 31, ())


def first_vex(code: bytes, *, compat: bool) -> tuple[int, int] | None:
    """Return (instructions before it, its offset) of the first such instruction of a block."""
    if not _SUSPECT.search(code):
        return None
    for nr, instruction in enumerate(_decoder(compat).disasm(code, 0)):
        if is_vex(code[instruction.address : instruction.address + 15], compat=compat):
            return nr, instruction.address
    return None


class VexTrap:
    """Looks at new blocks of code, and ends the run before one with VEX.

    read(address, nr) gives the guest's code, or raises `fault`; compat() tells 32-bit code;
    stop_before(address) ends the run before this new block. `look` is for the engine: it must be
    kept as long as that.
    """

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        fault: type[Exception],
        compat: Callable[[], bool],
        stop_before: Callable[[int], None],
    ) -> None:
        #: (address of the block, instructions before, address) of what ended the run.
        self.found: tuple[int, int, int] | None = None
        self.watching = True

        def look(_engine: int, block: Any, _last: int, _data: int) -> None:
            if not self.watching:
                return
            at, size = block.contents.pc, block.contents.size
            try:
                code = read(at, size)
            except fault:
                return
            if _SUSPECT.search(code) and (vex := first_vex(code, compat=compat())):
                self.found = at, vex[0], at + vex[1]
                stop_before(at)

        self.look = _CALLBACK(look)
