"""Translated blocks in Unicorn's engine: their links can be cut, and the blocks barred.

A block that ends in a jump to another of its own page is linked to it: the jump's displacement is
patched, and the engine hears no more of it. Cutting a link puts the displacement back to what the
translator had put there, a way out to the engine's main loop. That is one aligned store of 32 bits,
which a thread that runs the block sees either before or after. A block that has not run yet can be
barred: its code begins with the way out then.

Layout of the pinned release: a map of three levels leads from a page of the emulator's physical
memory to a PageDesc, whose list of blocks goes through two pages' worth of `page_next` in each
TranslationBlock (bit 0 of a pointer says which).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator

from xsave.guest.xen.cpuregs import UnsupportedEmulator, engine_bytes

_PAGE_SHIFT = 12
#: v_l1_size, v_l1_shift, v_l2_levels: 52 bits of physical addresses, 10 bits a level.
_MAP_SHAPE = struct.pack("<iii", 1024, 30, 2)
_MAP_BEFORE_SHAPE = 16
_LEVEL_BITS, _SHIFTS = 10, (30, 20, 10)
_PAGE_DESC_BYTES = 24
#: A block that is longer is none; a list that is longer is being changed.
_MAX_BYTES, _MAX_BLOCKS = 1 << 16, 8192
_NO_LINK = 0xFFFF
#: In the CPU object: TranslationBlock *tb_jmp_cache[4096].
_JUMP_CACHE, _JUMP_CACHE_LOW, _JUMP_CACHE_HIGH = 312, 0x3F, 0xFC0
#: In the engine: its TCGContext; in that, where code without a next block leads.
_TCG_CONTEXT, _EPILOGUE, _EPILOGUE_CODE = 0x300, 0x98, b"\x33\xc0"  # xor eax, eax
_JUMP, _JUMP_BYTES = b"\xe9", 5


class _TranslationBlock(ctypes.Structure):
    _fields_ = (
        ("pc", ctypes.c_uint64),
        ("cs_base", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("size", ctypes.c_uint16),
        ("icount", ctypes.c_uint16),
        ("cflags", ctypes.c_uint32),
        ("trace_vcpu_dstate", ctypes.c_uint32),
        ("code", ctypes.c_uint64),
        ("code_bytes", ctypes.c_uint64),
        ("orig_tb", ctypes.c_uint64),
        ("page_next", ctypes.c_uint64 * 2),
        ("page_addr", ctypes.c_uint64 * 2),
        ("jmp_reset_offset", ctypes.c_uint16 * 2),
        ("jmp_target_arg", ctypes.c_uint64 * 2),
    )


class Blocks:
    """The blocks of one engine, by the machine address of the page their code is in."""

    def __init__(self, library: ctypes.PyDLL, engine: int, cpu: int) -> None:
        """cpu: where the engine's CPU object lies. Raises UnsupportedEmulator."""
        self._engine = engine
        self.cache = cpu + _JUMP_CACHE
        self._forget = library.tb_invalidate_phys_range_x86_64
        self._forget.argtypes = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64
        self._forget.restype = None
        blob = engine_bytes(engine)
        at = blob.find(_MAP_SHAPE)
        if at < 0 or blob.find(_MAP_SHAPE, at + 4) >= 0:
            raise UnsupportedEmulator("this unicorn keeps its blocks elsewhere (2.1.4 is known)")
        self._map = engine + at - _MAP_BEFORE_SHAPE
        self._epilogue = _word(_word(engine + _TCG_CONTEXT) + _EPILOGUE)
        if ctypes.string_at(self._epilogue, len(_EPILOGUE_CODE)) != _EPILOGUE_CODE:
            raise UnsupportedEmulator("this unicorn's code ends otherwise (2.1.4 is known)")

    def forget(self, page: int) -> None:
        """Drop all blocks of a page. Only in the thread that runs them."""
        self._forget(self._engine, page, page + (1 << _PAGE_SHIFT))

    def bar(self, address: int) -> None:
        """Have the block at this address, the last that was translated, lead out of the code at its
        beginning. Only in the thread that will run it."""
        mixed = address ^ address >> 6
        index = mixed >> 6 & _JUMP_CACHE_HIGH | mixed & _JUMP_CACHE_LOW
        pointer = _word(self.cache + 8 * index)
        block = _TranslationBlock.from_address(pointer) if pointer else None
        if block is None or block.pc != address:
            raise UnsupportedEmulator("the emulator's new block is not where it tells of it")
        way = (self._epilogue - block.code - _JUMP_BYTES) & 0xFFFFFFFF
        ctypes.memmove(block.code, _JUMP + struct.pack("<I", way), _JUMP_BYTES)

    def cut(self, page: int) -> None:
        """Cut the links between the blocks of a page, from any thread. They are not linked again:
        forget() them as soon as the run has ended."""
        pointer = self._first(page >> _PAGE_SHIFT)
        for _ in range(_MAX_BLOCKS):
            if not pointer & ~1:
                return
            block = _TranslationBlock.from_address(pointer & ~1)
            for link in (0, 1):
                reset, target = block.jmp_reset_offset[link], block.jmp_target_arg[link]
                if reset != _NO_LINK and target < block.code_bytes < _MAX_BYTES:
                    # The displacement counts from its own end.
                    displacement = ctypes.c_int32.from_address(block.code + target)
                    displacement.value = reset - (target + 4)
            pointer = block.page_next[pointer & 1]

    def pages(self) -> Iterator[int]:
        """All pages that have blocks, from any thread."""
        tables = [(0, _word(self._map))]
        for _ in _SHIFTS:
            tables = [
                (index << _LEVEL_BITS | slot, below)
                for index, table in tables
                for slot, below in _entries(table, 1)
            ]
        for index, table in tables:
            for slot, _ in _entries(table, _PAGE_DESC_BYTES // 8):
                yield (index << _LEVEL_BITS | slot) << _PAGE_SHIFT

    def _first(self, index: int) -> int:
        """Return the first block's tagged pointer of the page with this number, 0 if none."""
        table = _word(self._map)
        for shift in _SHIFTS:
            table = _word(table + (index >> shift & (1 << _LEVEL_BITS) - 1) * 8)
            if not table:
                return 0
        return _word(table + (index & (1 << _LEVEL_BITS) - 1) * _PAGE_DESC_BYTES)


def _entries(table: int, nr_words: int) -> list[tuple[int, int]]:
    """Return (index, first word) of a table's entries of so many words that are not zero."""
    nr = 1 << _LEVEL_BITS
    words = (ctypes.c_uint64 * (nr * nr_words)).from_address(table)[::nr_words]
    return [(index, word) for index, word in enumerate(words) if word]


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
