"""ELF kernels made to measure."""

from __future__ import annotations

import struct

from xsave.guest.xen import elf

BASE = 0xFFFF_FFFF_8000_0000
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
PROGRAM = struct.Struct("<IIQQQQQQ")
PT_LOAD, PT_NOTE = 1, 4
TEXT = bytes(range(1, 256)) * 20  # 5100 bytes


def note(kind: int, desc: bytes, name: bytes = b"Xen\0") -> bytes:
    def padded(blob: bytes) -> bytes:
        return blob + bytes(-len(blob) % 4)

    return struct.pack("<III", len(name), len(desc), kind) + padded(name) + padded(desc)


def number(kind: int, value: int) -> bytes:
    return note(kind, struct.pack("<Q", value % (1 << 64)))


def notes(base: int = BASE, **more: int) -> bytes:
    """The notes of a small kernel; more: NOTE_X=value."""
    wanted = {"ENTRY": base + 0x1000, "VIRT_BASE": base, "PADDR_OFFSET": 0} | more
    return b"".join(number(getattr(elf, "NOTE_" + name), value) for name, value in wanted.items())


def make_elf(
    segments: list[tuple[int, bytes, int]] | None = None,
    note_bytes: bytes | None = None,
    **header: int,
) -> bytes:
    """An ELF of (paddr, bytes, memory_bytes) segments and notes."""
    segments = [(0x1000, TEXT, 8192)] if segments is None else segments
    parts = [(PT_LOAD, paddr, data, memory) for paddr, data, memory in segments]
    note_bytes = notes() if note_bytes is None else note_bytes
    parts.append((PT_NOTE, 0, note_bytes, len(note_bytes)))
    at = HEADER.size + PROGRAM.size * len(parts)
    programs, bodies = b"", b""
    for kind, paddr, data, memory in parts:
        offset = at + len(bodies)
        programs += PROGRAM.pack(kind, 7, offset, paddr, paddr, len(data), memory, 1)
        bodies += data
    fields = {"machine": 62, "phoff": HEADER.size, "phentsize": PROGRAM.size, "phnum": len(parts)}
    fields |= header
    head = HEADER.pack(
        b"\x7fELF\x02\x01\x01", 2, fields["machine"], 1, 0, fields["phoff"], 0, 0,
        HEADER.size, fields["phentsize"], fields["phnum"], 0, 0, 0,
    )  # fmt: skip
    return head + programs + bodies
