"""Where everything is in a hostile guest of 4 MiB: known before the domain is made.

pfn 1 has the handlers and the start, pfn 2 the words of the runtime, 3 the trap table, 4 to 63 the
program, 64 to 95 its data; then what the domain builder puts behind a kernel, in its order.
"""

from __future__ import annotations

from tests.fuzz.guest.machinecode import Value
from xsave.public import StartInfo

BASE = 0xFFFF_FFFF_8000_0000
MEMORY_BYTES = 4 << 20
NR_PAGES = MEMORY_BYTES >> 12
START_PFN, WORDS_PFN, TRAPS_PFN, CODE_PFN, DATA_PFN, KERNEL_PAGES = 1, 2, 3, 4, 64, 96
P2M_PFN = KERNEL_PAGES
START_INFO_PFN = P2M_PFN + NR_PAGES * 8 // 4096
STORE_PFN, CONSOLE_PFN = START_INFO_PFN + 1, START_INFO_PFN + 2
L4_PFN, L3_PFN, L2_PFN, L1_PFN = range(CONSOLE_PFN + 1, CONSOLE_PFN + 5)
STORE_PORT, CONSOLE_PORT = 1, 2
#: Pages of nobody: a stack, a mapping of shared_info, p2m frame lists, scratch, spaces for tables.
STACK_PFN, SHARED_PFN, LISTS_PFN = 120, 121, 122
CONTEXT_PFN, SCRATCH_PFN = 480, 500
TABLES_PFN = 512


def va(pfn, offset=0):
    """The address a page is mapped at."""
    return BASE + (pfn << 12) + offset


def mfn(pfn):
    """The frame of a page, when the time comes."""
    return Value(address=va(P2M_PFN, 8 * pfn))


def entry(pfn, flags):
    """A page-table entry for a page."""
    return Value(flags, va(P2M_PFN, 8 * pfn), 12)


NEXT, REPAIR = va(WORDS_PFN), va(START_PFN, 0x800)
STACK_TOP = va(STACK_PFN + 1)
SHARED = va(SHARED_PFN)
SCRATCH, STRUCT2 = va(SCRATCH_PFN), va(SCRATCH_PFN, 1024)
CONTEXT = va(CONTEXT_PFN)
SHARED_INFO_MADDR = va(START_INFO_PFN, StartInfo.shared_info.offset)
