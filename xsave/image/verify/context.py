"""Read vCPU contexts of either guest width: what leads to page tables, GDT and start_info.

The 64-bit structure is that of public.py. Of the 32-bit one (2800 bytes) only these few fields are
read; the offsets are those a compiler gives for xen/include/public on x86_32.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from xsave import public
from xsave.image.stream import Item
from xsave.image.verify.model import Image

#: libxc: FIRST_RESERVED_GDT_ENTRY; behind it Xen keeps its own segments.
MAX_GDT_ENTRIES = 7168
_GDT_ENTRIES_PER_FRAME = 512
#: From the start of a vCPU record to its context: the record's header and the vCPU's.
CONTEXT_OFFSET = 16

_EDX_32, _GDT_FRAMES_32, _GDT_ENTS_32, _CR3_32 = 0x20C, 0xA50, 0xA90, 0xA9C + 3 * 4


@dataclass(frozen=True)
class Paging:
    """Frames that a vCPU names; all are pfns. `cr1` is the raw field (0 in a 32-bit guest)."""

    cr3: int
    cr1: int
    gdt_ents: int
    gdt_slots: tuple[int, ...]
    rdx: int

    @property
    def user_table(self) -> int | None:
        """The pfn of the user page table, None if there is none."""
        return self.cr1 >> 12 if self.cr1 & 1 else None

    @property
    def roots(self) -> list[int]:
        """The top-level tables that are loaded."""
        return [self.cr3] if self.user_table is None else [self.cr3, self.user_table]

    @property
    def gdt_frames(self) -> tuple[int, ...]:
        """The frames of the GDT that are in use; none if it is too long."""
        nr_entries = self.gdt_ents if self.gdt_ents <= MAX_GDT_ENTRIES else 0
        return self.gdt_slots[: -(-nr_entries // _GDT_ENTRIES_PER_FRAME)]


def basic_items(image: Image) -> dict[int, Item]:
    """Return the BASIC record of each vCPU, those of a wrong size left out."""
    size = {8: public.VCPU_CONTEXT_BYTES_64, 4: public.VCPU_CONTEXT_BYTES_32}[image.guest_width]
    items = {n: records.get("X86_PV_VCPU_BASIC") for n, records in sorted(image.vcpus.items())}
    return {n: item for n, item in items.items() if item and len(item.value.context) == size}


def paging_of(image: Image) -> dict[int, Paging]:
    """Return what the vCPUs name, by vCPU number."""
    read = _paging_64 if image.guest_width == 8 else _paging_32
    return {n: read(item.value.context) for n, item in basic_items(image).items()}


def _paging_64(context: bytes) -> Paging:
    vcpu = public.VcpuGuestContext.from_buffer_copy(context)
    return Paging(
        cr3=vcpu.ctrlreg[3] >> 12,
        cr1=vcpu.ctrlreg[1],
        gdt_ents=vcpu.gdt_ents,
        gdt_slots=tuple(vcpu.gdt_frames),
        rdx=vcpu.user_regs.rdx,
    )


def _paging_32(context: bytes) -> Paging:
    (cr3,) = struct.unpack_from("<I", context, _CR3_32)
    (gdt_ents,) = struct.unpack_from("<I", context, _GDT_ENTS_32)
    (edx,) = struct.unpack_from("<I", context, _EDX_32)
    # "Extended cr3": a frame of up to 44 bits, rotated into 32 (public/arch-x86/xen-x86_32.h).
    pfn = (cr3 >> 12 | cr3 << 20) & 0xFFFF_FFFF
    return Paging(pfn, 0, gdt_ents, struct.unpack_from("<16I", context, _GDT_FRAMES_32), edx)
