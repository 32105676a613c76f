"""compare: two domains that stand still, page by page, by pfn.

The proof behind save and restore. Both domains' frames are read in place; nothing of the image
is believed. A pfn's two frames must hold the same bytes but for what the change of frames itself
demands: page tables are compared after canonicalisation, the p2m's pages must say where each
domain's frames really are; start_info and the p2m's frame lists are what a restore or the guest
fills in anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xsave import p2m as guest_p2m
from xsave.canonical import canonicalise, local_p2m, mfns_to_pfns
from xsave.frames import INVALID_P2M_ENTRY, TYPE_LTAB_MASK, PageType, table_level
from xsave.guest.xen.domctl import Domctl
from xsave.public import SharedInfo, VcpuGuestContext
from xsave.view import page_types

BATCH = 1024
_INVALID = np.uint64(INVALID_P2M_ENTRY)


@dataclass(frozen=True)
class Side:
    """One domain: its p2m (size,) u64, page types (size,) u8, the pfns of p2m and start_info."""

    domctl: Domctl
    p2m: np.ndarray
    types: np.ndarray
    p2m_pfns: np.ndarray
    list_pfns: np.ndarray
    start_info_pfn: int

    def pages(self, pfns: np.ndarray) -> np.ndarray:
        """Return the frames of these pfns, (n, 512) u64."""
        return np.asarray(self.domctl.machine.mem[self.p2m[pfns]])


@dataclass(frozen=True)
class Sample:
    """Where one pfn was and is."""

    pfn: int
    old_mfn: int
    new_mfn: int
    page_type: str


@dataclass(frozen=True)
class Comparison:
    """What was found. `different` are the pfns for which there is no excuse."""

    nr_pages: int
    moved_pages: int
    equal_pages: int
    equal_tables: int
    p2m_pages: int
    rewritten_pages: int
    different: tuple[int, ...]
    samples: tuple[Sample, ...]


def compare(old: Domctl, new: Domctl, *, nr_samples: int = 8) -> Comparison:
    """Compare two paused domains. Raises GuestStateError if one has no p2m to go by."""
    a, b = side(old), side(new)
    size = min(a.p2m.size, b.p2m.size)
    backed = (a.p2m[:size] != _INVALID) & (b.p2m[:size] != _INVALID)
    # A pfn that only one of them has, or has as another type, differs whatever it holds.
    wrong = np.ones(max(a.p2m.size, b.p2m.size), bool)
    wrong[:size] = a.types[:size] != b.types[:size]
    pfns = np.flatnonzero(backed & ~wrong[:size])
    levels = np.array([table_level(int(t)) for t in range(256)], np.uint8)[a.types[pfns]]
    special = np.union1d(a.p2m_pfns, a.list_pfns)
    excused = np.isin(pfns, special) | (pfns == a.start_info_pfn)
    plain, tables = pfns[(levels == 0) & ~excused], pfns[levels > 0]
    wrong[plain[~equal_pages(a, b, plain)]] = True
    wrong[tables[~equal_tables(a, b, tables)]] = True
    wrong[a.p2m_pfns[~(p2m_holds(a) & p2m_holds(b))]] = True
    return Comparison(
        nr_pages=int(pfns.size),
        moved_pages=int(np.count_nonzero(a.p2m[pfns] != b.p2m[pfns])),
        equal_pages=int(np.count_nonzero(~wrong[plain])),
        equal_tables=int(np.count_nonzero(~wrong[tables])),
        p2m_pages=int(a.p2m_pfns.size),
        rewritten_pages=int(np.count_nonzero(excused)) - int(a.p2m_pfns.size),
        different=tuple(np.flatnonzero(wrong).tolist()),
        samples=samples(a, b, pfns, nr_samples),
    )


def side(domctl: Domctl) -> Side:
    """Look at one domain."""
    state = domctl.state()
    shared = SharedInfo.from_buffer_copy(domctl.machine.pages[state.shared_info_mfn].tobytes())
    found = guest_p2m.find(domctl, state, shared)
    types = page_types(domctl, found.p2m)
    context = VcpuGuestContext.from_buffer_copy(domctl.vcpus()[0].context)
    mfn = np.array([context.user_regs.rdx], np.uint64)
    start_info, known = mfns_to_pfns(mfn, domctl.machine.m2p, found.p2m)
    frames, lists = found.frames.astype(np.intp), found.list_frames.astype(np.intp)
    return Side(domctl, found.p2m, types, frames, lists, int(start_info[0]) if known[0] else -1)


def equal_pages(a: Side, b: Side, pfns: np.ndarray) -> np.ndarray:
    """Return (n,) bool: the pages whose bytes are the same."""
    equal = np.ones(pfns.size, bool)
    for first in range(0, pfns.size, BATCH):
        part = pfns[first : first + BATCH]
        equal[first : first + BATCH] = (a.pages(part) == b.pages(part)).all(axis=1)
    return equal


def equal_tables(a: Side, b: Side, pfns: np.ndarray) -> np.ndarray:
    """Return (n,) bool: the page tables that are the same with pfns for mfns."""
    canonical = []
    for one in (a, b):
        levels = one.types[pfns] & np.uint8(TYPE_LTAB_MASK)
        result = canonicalise(one.pages(pfns), levels, one.domctl.machine.m2p, one.p2m)
        result.tables[result.deferred] = _INVALID - np.uint64(one is a)
        canonical.append(result.tables)
    return np.asarray((canonical[0] == canonical[1]).all(axis=1))


def p2m_holds(one: Side) -> np.ndarray:
    """Return (n,) bool: the pages of the p2m that say where the frames really are."""
    return np.asarray((one.pages(one.p2m_pfns) == local_p2m(one.p2m)).all(axis=1))


def samples(a: Side, b: Side, pfns: np.ndarray, count: int) -> tuple[Sample, ...]:
    """Return pfns from all over the guest: half page tables, half others."""
    tables = a.types[pfns] != PageType.NOTAB
    chosen = [*spread(pfns[tables], count // 2), *spread(pfns[~tables], count - count // 2)]
    return tuple(
        Sample(pfn, int(a.p2m[pfn]), int(b.p2m[pfn]), PageType(int(a.types[pfn])).name)
        for pfn in sorted(chosen)
    )


def spread(pfns: np.ndarray, count: int) -> list[int]:
    """Return up to `count` of the pfns, evenly spread."""
    if not pfns.size:
        return []
    return [int(pfn) for pfn in np.unique(pfns[np.linspace(0, pfns.size - 1, count).astype(int)])]
