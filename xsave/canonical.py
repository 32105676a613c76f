"""Canonicalise and localise: machine frame numbers in pages to guest pfns, and back.

Pure functions over whole batches of page-table pages, (n, 512) u64. Xen's libxc v2 says
normalise_page and localise_page (tools/libs/guest/xg_sr_{save,restore}_x86_pv.c); the literature
says canonicalise. Only present entries hold frame numbers; an L4 loses the slots that are Xen's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xsave.frames import (
    INVALID_P2M_ENTRY,
    PAGE_SHIFT,
    PTE_FLAGS_MASK,
    PTE_FRAME_MASK,
    PTE_PRESENT,
    PTE_PSE,
    XEN_L4_SLOTS,
)

_SHIFT = np.uint64(PAGE_SHIFT)
_FRAME = np.uint64(PTE_FRAME_MASK)
_FLAGS = np.uint64(PTE_FLAGS_MASK)
_PRESENT = np.uint64(PTE_PRESENT)


@dataclass(frozen=True)
class Canonicalised:
    """The result for n tables.

    tables: (n, 512) u64 with pfns; deferred: (n,) bool, tables with an entry that names a frame
    the guest has no pfn for. On a running guest such a table is sent later (XTAB for now), on a
    suspended one that is fatal. bad: (k, 2) rows (table index, slot) of those entries.
    """

    tables: np.ndarray
    deferred: np.ndarray
    bad: np.ndarray


def mfns_to_pfns(
    mfns: np.ndarray, m2p: np.ndarray, p2m: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (pfns, valid) for mfns of any shape.

    A frame is the guest's if m2p names a pfn inside the p2m and p2m agrees: either table alone
    may hold anything, as the guest writes to both.
    """
    inside = mfns < np.uint64(m2p.size)
    pfns = m2p[np.where(inside, mfns, np.uint64(0))]
    inside &= pfns < np.uint64(p2m.size)
    pfns = np.where(inside, pfns, np.uint64(0))
    return pfns, inside & (p2m[pfns] == mfns)


def canonicalise(
    tables: np.ndarray, levels: np.ndarray, m2p: np.ndarray, p2m: np.ndarray
) -> Canonicalised:
    """Replace mfns by pfns in the present entries of n page tables of levels 1..4.

    A superpage entry (PSE above level 1) counts as bad: Xen cannot migrate those either.
    """
    out = tables.copy()
    first, last = XEN_L4_SLOTS
    out[levels == 4, first : last + 1] = 0
    present = (out & _PRESENT) != 0
    pfns, valid = mfns_to_pfns((out & _FRAME) >> _SHIFT, m2p, p2m)
    valid[levels > 1] &= (out[levels > 1] & np.uint64(PTE_PSE)) == 0
    pfns <<= _SHIFT
    pfns |= out & _FLAGS
    bad = np.argwhere(present & ~valid)
    deferred = np.zeros(len(tables), bool)
    deferred[bad[:, 0]] = True
    return Canonicalised(np.where(present & valid, pfns, out), deferred, bad)


def present_entries(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (at, pfns) of the present entries of canonical tables (n, 512): where they are in all
    of them, row by row, and the pfns they name."""
    flat = tables.reshape(-1)
    at = np.flatnonzero(flat & _PRESENT)
    return at, (flat[at] & _FRAME) >> _SHIFT


def localise_entries(tables: np.ndarray, at: np.ndarray, pfns: np.ndarray, p2m: np.ndarray) -> None:
    """localise() in place, of tables (n, 512) in one piece whose present entries are known."""
    flat = tables.view()
    flat.shape = (-1,)  # a copy would be of no use
    flat[at] = p2m[pfns] << _SHIFT | flat[at] & _FLAGS


def localise(tables: np.ndarray, p2m: np.ndarray) -> np.ndarray:
    """Replace pfns by mfns in the present entries; every pfn must be inside p2m and mapped."""
    present = (tables & _PRESENT) != 0
    pfns = (tables & _FRAME) >> _SHIFT
    pfns *= present  # what is not present may look like anything
    mfns = p2m[pfns]
    mfns <<= _SHIFT
    mfns |= tables & _FLAGS
    return np.where(present, mfns, tables)


def canonical_p2m(
    p2m: np.ndarray, per_page: int = 512, rows: np.ndarray | None = None
) -> np.ndarray:
    """Return the p2m's pages, or these rows (n,) of them, as an image holds them, (n, 512) u64:
    entry i is i, or invalid.

    Xen's own tools leave the sender's mfns in these pages and overwrite them on restore; with
    the identity in their place no mfn of the host gets into the image.
    """
    if rows is None:
        rows = np.arange(-(-p2m.size // per_page))
    pfns = rows[:, None] * per_page + np.arange(per_page)
    holes = p2m.take(pfns, mode="clip") == np.uint64(INVALID_P2M_ENTRY)
    holes |= pfns >= p2m.size
    pages = pfns.astype(np.uint64)
    pages[holes] = INVALID_P2M_ENTRY
    return pages


def local_p2m(p2m: np.ndarray, per_page: int = 512, rows: np.ndarray | None = None) -> np.ndarray:
    """Return the p2m's pages, or these rows (n,) of them, as the guest finds them after a restore,
    (n, 512) u64."""
    if rows is None:
        rows = np.arange(-(-p2m.size // per_page))
    pfns = rows[:, None] * per_page + np.arange(per_page)
    pages = p2m.take(pfns, mode="clip")
    pages[pfns >= p2m.size] = INVALID_P2M_ENTRY
    return pages
