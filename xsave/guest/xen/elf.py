"""Just enough ELF for a PV kernel: its load segments and its Xen notes (libelf's part)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from xsave.errors import HostCannotTake

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PT_LOAD, _PT_NOTE = 1, 4
_PF_X = 1
_MAX_KERNEL_BYTES = 256 << 20

NOTE_ENTRY, NOTE_HYPERCALL_PAGE, NOTE_VIRT_BASE, NOTE_PADDR_OFFSET = 1, 2, 3, 4
NOTE_XEN_VERSION, NOTE_LOADER, NOTE_INIT_P2M, NOTE_MOD_START_PFN = 5, 8, 15, 16


@dataclass(frozen=True)
class Segment:
    """One PT_LOAD: where its bytes are in the file and where it goes in physical memory, and
    whether any of it is code."""

    offset: int
    paddr: int
    file_bytes: int
    memory_bytes: int
    executable: bool = True


@dataclass(frozen=True)
class Kernel:
    """A parsed kernel. Numeric notes are integers; missing ones are not in `notes`."""

    data: bytes | memoryview
    segments: tuple[Segment, ...]
    notes: dict[int, int] = field(default_factory=dict)

    @property
    def entry(self) -> int:
        return self.notes[NOTE_ENTRY]

    @property
    def virt_base(self) -> int:
        return self.notes.get(NOTE_VIRT_BASE, 0xFFFF_FFFF_8000_0000)

    @property
    def end(self) -> int:
        """First physical address behind the kernel."""
        return max(s.paddr + s.memory_bytes for s in self.segments)


def _bad(name: str, what: str) -> HostCannotTake:
    return HostCannotTake(f"{name}: not a 64-bit Xen PV kernel: {what}")


def parse(data: bytes | memoryview, name: str) -> Kernel:
    """Parse an ELF kernel. Raises HostCannotTake for anything else, naming what is wrong."""
    if data[:4] != b"\x7fELF":
        raise _bad(name, "expected an ELF file or a bzImage, found neither")
    try:
        header = _EHDR.unpack_from(data)
        if header[0][4:6] != b"\x02\x01" or header[2] != 62:
            raise _bad(name, "expected a little-endian x86-64 ELF")
        programs = [_PHDR.unpack_from(data, header[5] + i * header[9]) for i in range(header[10])]
    except (struct.error, OverflowError) as e:
        raise _bad(name, "the ELF file is truncated") from e
    segments: list[Segment] = []
    notes: dict[int, int] = {}
    for kind, flags, offset, _vaddr, paddr, file_bytes, memory_bytes, _align in programs:
        larger_in_file = file_bytes > memory_bytes and kind == _PT_LOAD
        if offset + file_bytes > len(data) or larger_in_file:
            raise _bad(name, "a segment lies outside the file")
        if kind == _PT_LOAD and memory_bytes:
            segments.append(Segment(offset, paddr, file_bytes, memory_bytes, bool(flags & _PF_X)))
        elif kind == _PT_NOTE:
            notes |= _notes(data[offset : offset + file_bytes])
    kernel = Kernel(data, tuple(segments), notes)
    _check(kernel, name)
    return kernel


def _check(kernel: Kernel, name: str) -> None:
    if not kernel.segments:
        raise _bad(name, "it has nothing to load")
    if NOTE_ENTRY not in kernel.notes:
        raise _bad(name, "it has no XEN_ELFNOTE_ENTRY note")
    if kernel.end > _MAX_KERNEL_BYTES:
        raise _bad(name, f"it ends at {kernel.end:#x}, more than {_MAX_KERNEL_BYTES >> 20} MiB")


def _notes(blob: bytes | memoryview) -> dict[int, int]:
    """Collect the numeric notes whose name is Xen; strings are recorded as 0."""
    found: dict[int, int] = {}
    at = 0
    while at + 12 <= len(blob):
        name_bytes, desc_bytes, kind = struct.unpack_from("<III", blob, at)
        name_at = at + 12
        desc_at = name_at + (name_bytes + 3 & ~3)
        at = desc_at + (desc_bytes + 3 & ~3)
        if at > len(blob) + 3 or blob[name_at : name_at + 4] != b"Xen\0":
            continue
        desc = blob[desc_at : desc_at + desc_bytes]
        found[kind] = int.from_bytes(desc, "little") if len(desc) in (4, 8) else 0
    return found
