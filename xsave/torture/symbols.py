"""The kernel's symbols: where its page-table paths are, and what an address is called."""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from xsave.errors import HostCannotTake

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_SHT_SYMTAB = 2
_STT_FILE, _STT_SECTION = 4, 3
_SHN_ABS, _SHN_UNDEF = 0xFFF1, 0
WINDOW_START, WINDOW_END = "__pgtable_text_start", "__pgtable_text_end"


@dataclass(frozen=True)
class Symbols:
    """Names and addresses of one kernel; absolute symbols are in `address` only."""

    address: dict[str, int]
    code: tuple[tuple[int, str], ...]  # ascending

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _ in self.code]

    @property
    def window(self) -> tuple[int, int]:
        """The first and the last address of the page-table update paths."""
        return self.address[WINDOW_START], self.address[WINDOW_END] - 1

    @property
    def text(self) -> tuple[int, int]:
        """The first and the last address of the kernel's code."""
        return self.address["_text"], self.address["_etext"] - 1

    def function(self, address: int) -> tuple[str, int]:
        """Return the name of the function around an address, and its offset in it."""
        i = bisect_right(self._starts, address) - 1
        if i < 0:
            return "?", 0
        return self.code[i][1], address - self.code[i][0]

    def name(self, address: int) -> str:
        """Return `function+0x12`."""
        function, offset = self.function(address)
        return f"{function}+{offset:#x}"

    def is_code(self, address: int) -> bool:
        first, last = self.text
        return first <= address <= last


def read_symbols(elf: bytes, name: str) -> Symbols:
    """Read the symbol table of a kernel. Raises HostCannotTake if it cannot be tortured."""
    address: dict[str, int] = {}
    code: list[tuple[int, str]] = []
    header = _EHDR.unpack_from(elf)
    sections = [_SHDR.unpack_from(elf, header[6] + i * header[11]) for i in range(header[12])]
    for section in sections:
        if section[1] != _SHT_SYMTAB:
            continue
        offset, size, link = section[4], section[5], section[6]
        strings = sections[link][4]
        for at in range(offset, offset + size, _SYM.size):
            at_name, info, _other, index, value, _size = _SYM.unpack_from(elf, at)
            if info & 15 in (_STT_FILE, _STT_SECTION) or index == _SHN_UNDEF:
                continue
            start = strings + at_name
            symbol = elf[start : elf.index(b"\0", start)].decode()
            address[symbol] = value
            if index != _SHN_ABS and not symbol.startswith("__pgtable_text"):
                code.append((value, symbol))
    missing = [s for s in (WINDOW_START, WINDOW_END, "_text", "_etext") if s not in address]
    if missing:
        raise HostCannotTake(
            f"{name}: a kernel without the symbol {missing[0]}: which of its code "
            "updates page tables cannot be known"
        )
    first, last = address["_text"], address["_etext"]
    return Symbols(address, tuple(sorted((a, s) for a, s in code if first <= a < last)))
