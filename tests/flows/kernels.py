"""Kernels of a few bytes, for guests that do one thing only."""

from __future__ import annotations

import struct

VIRT_BASE = 0xFFFF_FFFF_8000_0000
_HEADER_BYTES, _PROGRAM_BYTES = 64, 56
_NOTE_ENTRY, _NOTE_VIRT_BASE = 1, 3
_PT_LOAD, _PT_NOTE = 1, 4


def elf(code):
    """Return an ELF kernel that consists of this machine code, loaded and entered at address 0
    of its address space."""
    notes = _note(_NOTE_ENTRY, VIRT_BASE) + _note(_NOTE_VIRT_BASE, VIRT_BASE)
    note_at = _HEADER_BYTES + 2 * _PROGRAM_BYTES
    code_at = note_at + len(notes)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, 62, 1, VIRT_BASE, _HEADER_BYTES, 0, 0, 64, 56, 2, 0, 0, 0
    )
    load = _program(_PT_LOAD, code_at, VIRT_BASE, len(code))
    return header + load + _program(_PT_NOTE, note_at, 0, len(notes)) + notes + code


def _note(kind, value):
    return struct.pack("<III4sQ", 4, 8, kind, b"Xen\0", value)


def _program(kind, offset, vaddr, size):
    return struct.pack("<IIQQQQQQ", kind, 7, offset, vaddr, 0, size, size, 1)


#: `1: jmp 1b`: it never enters the hypervisor again.
SPINNING = elf(b"\xeb\xfe")
#: `1: mov $29 (sched_op), %eax; mov $1 (block), %edi; syscall; jmp 1b`: asleep, for ever.
SLEEPING = elf(b"\xb8\x1d\0\0\0\xbf\x01\0\0\0\x0f\x05\xeb\xf2")
#: `ud2` without a trap table: the guest crashes at once.
CRASHING = elf(b"\x0f\x0b")
