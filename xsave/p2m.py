"""How the toolstack finds a guest's p2m: through shared_info, as libxc's map_p2m does.

Either a linear list in the guest's virtual memory (p2m_cr3, p2m_vaddr) or the three-level tree
of pfn_to_mfn_frame_list_list. Where nothing is, both may lead to one page of holes again and
again; a tree whose last list pages are all the same says so of all they cover. A domain that was
restored and never ran has published neither: the list of its image is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xsave.canonical import mfns_to_pfns
from xsave.errors import GuestStateError
from xsave.frames import INVALID_P2M_ENTRY, PTE_FRAME_MASK, PTE_PRESENT
from xsave.guest.xen.domctl import DomainState, Domctl
from xsave.public import SharedInfo

PER_PAGE = 512
_MAX_PFNS = 1 << 32
#: A p2m may be larger than the memory behind it (gaps, ballooning), not absurdly so. A Linux that
#: grows beyond what it began with plugs memory in above 4 GiB, however small it is.
_P2M_PER_FRAME = 4
_ALWAYS_PFNS = 1 << 22


@dataclass(frozen=True)
class GuestP2m:
    """A guest's p2m as found: p2m (size,) u64 with INVALID_P2M_ENTRY for holes; frames: the pfns
    of its pages; list_frames: the pfns of the pages of the frame-list tree, if there is one."""

    p2m: np.ndarray
    frames: np.ndarray
    list_frames: np.ndarray


@dataclass(frozen=True)
class Located:
    """Where a guest keeps its p2m of so many pfns: the frames of its pages, (n,) u64, and of the
    pages of its frame lists."""

    size: int
    leaves: np.ndarray
    lists: np.ndarray


def largest(nr_frames: int) -> int:
    """Return how many pfns a guest may have on a host of so many frames."""
    return max(_P2M_PER_FRAME * nr_frames, _ALWAYS_PFNS)


def find(domctl: Domctl, state: DomainState, shared: SharedInfo) -> GuestP2m:
    """Read the p2m of a suspended or never-run domain. Raises GuestStateError."""
    if state.never_run and state.p2m_frames is not None:
        return _of_image(domctl, state, state.p2m_frames)
    located = locate(domctl, shared)
    p2m = read(domctl, located, np.arange(located.size))
    return GuestP2m(p2m, *pages(domctl, located, p2m))


def locate(domctl: Domctl, shared: SharedInfo) -> Located:
    """Return where the guest has published its p2m. Raises GuestStateError."""
    size = shared.arch.max_pfn
    if not 0 < size < _MAX_PFNS:
        raise GuestStateError(f"the guest says it has {size} pfns (shared_info.arch.max_pfn)")
    tree = _tree(domctl, shared.arch.pfn_to_mfn_frame_list_list, size)
    if shared.arch.p2m_cr3:
        _require_size(domctl, size)
        leaves = _linear(domctl, shared.arch.p2m_cr3, shared.arch.p2m_vaddr, _nr_pages(size))
    elif tree is not None:
        size, leaves = tree[1:]
    else:
        raise GuestStateError("the guest has published no p2m (shared_info.arch)")
    return Located(size, leaves, tree[0] if tree is not None else np.empty(0, np.uint64))


def read(domctl: Domctl, located: Located, pfns: np.ndarray) -> np.ndarray:
    """Return the p2m's entries of these pfns (n,) i64, which ascend, none twice; what names no
    frame of the guest is a hole (foreign, identity, or nonsense)."""
    machine = domctl.machine
    if pfns.size == located.size:  # all of them
        entries = machine.mem[located.leaves].reshape(-1)[: pfns.size]
    else:
        entries = machine.mem[located.leaves[pfns // PER_PAGE], pfns % PER_PAGE]
    inside = entries < np.uint64(machine.nr_frames)
    frames = np.where(inside, entries, np.uint64(0)).view(np.int64)  # 0 is nobody's
    good = machine.m2p.take(frames) == pfns.view(np.uint64)
    good &= machine.owner.take(frames) == domctl.domid
    return np.where(good, entries, np.uint64(INVALID_P2M_ENTRY))


def pages(domctl: Domctl, located: Located, p2m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pfns of the p2m's pages, and those of its frame lists, ascending. Raises
    GuestStateError."""
    frames, valid = mfns_to_pfns(located.leaves, domctl.machine.m2p, p2m)
    if not valid.all():
        raise GuestStateError("the guest's p2m list lies in frames it has no pfn for")
    lists, valid = mfns_to_pfns(np.unique(located.lists), domctl.machine.m2p, p2m)
    return frames, lists[valid]


def _nr_pages(size: int) -> int:
    return -(-size // PER_PAGE)


def _of_image(domctl: Domctl, state: DomainState, frames: np.ndarray) -> GuestP2m:
    """The m2p of a domain that never ran is the restore's own work: invert it."""
    machine = domctl.machine
    mfns = np.flatnonzero(machine.owner == domctl.domid).astype(np.uint64)
    pfns = machine.m2p[mfns]
    known = pfns < np.uint64(state.p2m_size)
    p2m = np.full(state.p2m_size, INVALID_P2M_ENTRY, np.uint64)
    p2m[pfns[known]] = mfns[known]
    return GuestP2m(p2m, frames, np.empty(0, np.uint64))


def _require(domctl: Domctl, mfns: np.ndarray, what: str) -> np.ndarray:
    owned = domctl.owned(mfns)
    if not owned.all():
        wrong = int(mfns[~owned][0])
        raise GuestStateError(f"the guest's {what} names frame {wrong:#x}, which is not its own")
    return mfns


def _require_size(domctl: Domctl, size: int) -> None:
    if size > largest(domctl.machine.nr_frames):
        raise GuestStateError(f"the guest's p2m of {size} pfns is too large for this host")


def _tree(domctl: Domctl, top: int, size: int) -> tuple[np.ndarray, int, np.ndarray] | None:
    """Return (frames of the lists, pfns they cover, frames of the p2m pages), None without."""
    if top == 0 or top == INVALID_P2M_ENTRY:
        return None
    mem = domctl.machine.mem
    nr_lists = -(-_nr_pages(size) // PER_PAGE)
    tops = _require(domctl, np.array([top], np.uint64), "frame_list_list")
    if nr_lists > PER_PAGE:
        raise GuestStateError(f"the guest's p2m of {size} pfns is too large for a frame list")
    lists = _without_tail(mem[tops[0], :nr_lists].copy())
    size = min(size, lists.size * PER_PAGE * PER_PAGE)
    _require_size(domctl, size)
    _require(domctl, lists, "frame list")
    leaves = mem[lists].reshape(-1)[: _nr_pages(size)]
    return np.concatenate((tops, lists)), size, _require(domctl, leaves, "frame list page")


def _without_tail(lists: np.ndarray) -> np.ndarray:
    """Return the list pages but the repeats of the last one: they cover nothing but holes, as no
    pfn's frame can be another's too. (libxc too lowers max_pfn then.)"""
    changes = np.flatnonzero(np.diff(lists))
    return lists[: int(changes[-1]) + 2 if changes.size else 1]


def _linear(domctl: Domctl, cr3: int, vaddr: int, nr: int) -> np.ndarray:
    """Walk the guest's page tables for nr pages from vaddr on; return their mfns."""
    mem = domctl.machine.mem
    pages = (vaddr >> 12) + np.arange(nr, dtype=np.uint64)
    tables = np.full(nr, cr3 >> 12, np.uint64)
    for shift in (27, 18, 9, 0):
        _require(domctl, np.unique(tables), "p2m page table")
        entries = mem[tables, (pages >> np.uint64(shift)) & np.uint64(511)]
        if not (entries & np.uint64(PTE_PRESENT)).all():
            raise GuestStateError(f"the guest's p2m list at {vaddr:#x} is not mapped throughout")
        tables = (entries & np.uint64(PTE_FRAME_MASK)) >> np.uint64(12)
    return _require(domctl, tables, "p2m list")
