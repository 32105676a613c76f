"""What a frame is used as, and what the entries of page tables may say: the numbers and rules that
all have in common who look at them (PGT_* and *_DISALLOW_MASK of Xen, in numbers of our own).
"""

from __future__ import annotations

import numpy as np

from xsave.frames import (
    PAGE_SHIFT,
    PTE_FRAME_MASK,
    PTE_GLOBAL,
    PTE_PCD,
    PTE_PSE,
    PTE_PWT,
)

PGT_NONE = 0
PGT_L1, PGT_L2, PGT_L3, PGT_L4 = 1, 2, 3, 4
PGT_WRITABLE = 5
PGT_SEG_DESC = 6
PGT_XEN = 7  # Xen's own frames of a domain: no guest mapping at all
PGT_DYING = 8  # a table nobody uses, whose entries still hold what they name

#: Flags an entry may not have. L1: cache attributes need I/O capabilities a guest has not got.
DISALLOWED = {
    PGT_L1: PTE_PWT | PTE_PCD | PTE_PSE,
    PGT_L2: PTE_PSE | PTE_PWT | PTE_PCD | PTE_GLOBAL,
    PGT_L3: PTE_PSE | PTE_PWT | PTE_PCD | PTE_GLOBAL,
    PGT_L4: PTE_PSE | PTE_PWT | PTE_PCD | PTE_GLOBAL,
}
#: Of the counts' own dtype: ufunc.at is 15 times slower where it must convert.
ONE = np.uint32(1)


def targets_of(entries: np.ndarray) -> np.ndarray:
    """Return the mfns that entries name, i64: indices of another type cost twice as much."""
    return ((entries & np.uint64(PTE_FRAME_MASK)) >> np.uint64(PAGE_SHIFT)).view(np.int64)
