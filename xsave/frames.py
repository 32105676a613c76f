"""Frame numbers, page types and page-table entry bits: the vocabulary shared by the
image formats, the canonicaliser and the emulated hypervisor. A leaf: imports nothing of xsave.

Sources: xen/include/public/arch-x86 and tools/libs/guest/xg_sr_stream_format.h.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NewType

Pfn = NewType("Pfn", int)
Mfn = NewType("Mfn", int)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PTES_PER_TABLE = 512

#: Entry of a p2m that maps no frame (64-bit guests).
INVALID_P2M_ENTRY = (1 << 64) - 1
#: Entry of Xen's m2p for a frame that belongs to no guest pfn.
INVALID_M2P_ENTRY = 0x5555555555555555


class PageType(IntEnum):
    """libxc page types as PAGE_DATA carries them (bits 63-60 of an entry)."""

    NOTAB = 0x0
    L1TAB = 0x1
    L2TAB = 0x2
    L3TAB = 0x3
    L4TAB = 0x4
    L1TAB_PINNED = 0x9
    L2TAB_PINNED = 0xA
    L3TAB_PINNED = 0xB
    L4TAB_PINNED = 0xC
    BROKEN = 0xD
    XALLOC = 0xE
    XTAB = 0xF


#: Set in the type of a page table that is pinned.
TYPE_PIN = 0x8
TYPE_LTAB_MASK = 0x7

PTE_PRESENT = 1 << 0
PTE_RW = 1 << 1
PTE_USER = 1 << 2
PTE_PWT = 1 << 3
PTE_PCD = 1 << 4
PTE_ACCESSED = 1 << 5
PTE_DIRTY = 1 << 6
PTE_PSE = 1 << 7  # at L2 and above; PAT at L1
PTE_GLOBAL = 1 << 8
PTE_NX = 1 << 63
#: Bits 12-51: the frame an entry names.
PTE_FRAME_MASK = 0x000F_FFFF_FFFF_F000
PTE_FLAGS_MASK = 0xFFF0_0000_0000_0FFF

#: L4 slots of a 64-bit guest that belong to Xen (0xffff8000_00000000 and up): first, last.
XEN_L4_SLOTS = (256, 271)


def table_level(page_type: int) -> int:
    """Return 1..4 for a (possibly pinned) page-table type, 0 for every other type."""
    level = page_type & TYPE_LTAB_MASK
    return level if page_type in (1, 2, 3, 4, 9, 10, 11, 12) and 1 <= level <= 4 else 0


def type_has_data(page_type: int) -> bool:
    """True if a PAGE_DATA entry of this type is followed by 4096 bytes."""
    return page_type not in (PageType.BROKEN, PageType.XALLOC, PageType.XTAB)
