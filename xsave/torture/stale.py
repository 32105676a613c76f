"""Frame numbers of machine A in an image: none may be there, and where those are that are.

Everything a toolstack knows of is canonical in an image: page tables, the p2m and its list tree,
start_info, shared_info, cr3, the GDT frames, rdx of vCPU 0. So every aligned word of every page
and of every vCPU's context counts, as a plain mfn, as mfn << 12 with any offset, or as an entry
with any flags. The guest's frames come from a range no other number falls into (laboratory.py).

What is found has a class:

    register    in a vCPU's context
    stack       on a thread's stack between its stack pointer and the top: a saved context (the
                pt_regs of an interrupted thread) or a function's frame
    page        in any other page, page tables included
    dead        on a stack below the stack pointer: nobody will read it; told, not counted
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xsave.frames import PAGE_SHIFT
from xsave.image import libxc
from xsave.image.buffers import reader
from xsave.image.pages import PageBatch, has_data
from xsave.image.stream import StreamDecoder
from xsave.public import UserRegs, VcpuGuestContext
from xsave.torture.tasks import Tasks

_NX = np.uint64(1 << 63)
_SHIFT = np.uint64(PAGE_SHIFT)
REGISTER, STACK, PAGE, DEAD = "register", "stack", "page", "dead"


@dataclass(frozen=True)
class Stale:
    """One word: its class, a name of the place, its value, the page it is in (-1: none)."""

    kind: str
    where: str
    value: int
    pfn: int = -1


def mfns_in(words: np.ndarray, first: int, nr: int) -> np.ndarray:
    """Return bool, as words (u64): which ones hold one of the mfns [first, first + nr)."""
    low, span = np.uint64(first), np.uint64(nr)
    plain = words - low < span
    return plain | (((words & ~_NX) >> _SHIFT) - low < span)


class Detector:
    """Looks for the mfns [first, first + nr) in images of a guest whose tasks it can ask for."""

    def __init__(self, first: int, nr: int, tasks: Callable[[], Tasks]) -> None:
        self._first, self._nr = first, nr
        self._tasks = tasks

    def find(self, image: bytes) -> list[Stale]:
        """Return what is stale in an image."""
        found: list[Stale] = []
        for item in StreamDecoder(reader(image)):
            if isinstance(item.value, PageBatch):
                found += self._pages(item.value)
            elif isinstance(item.value, libxc.X86PvVcpuBasic):
                found += self._context(item.value)
            elif isinstance(item.value, libxc.SharedInfo):
                found += self._words(item.value.content, "shared_info")
        return found

    def _hits(self, data: bytes | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        words = np.frombuffer(data, np.uint64, len(data) // 8)
        hits = np.flatnonzero(mfns_in(words, self._first, self._nr))
        return hits, words[hits]

    def _words(self, data: bytes, what: str) -> list[Stale]:
        hits, values = self._hits(data)
        pairs = zip(hits.tolist(), values.tolist(), strict=True)
        return [Stale(PAGE, f"{what}+{8 * at:#x}", value) for at, value in pairs]

    def _context(self, record: libxc.X86PvVcpuBasic) -> list[Stale]:
        hits, values = self._hits(bytes(record.context))
        pairs = zip(hits.tolist(), values.tolist(), strict=True)
        return [
            Stale(REGISTER, f"vCPU {record.vcpu_id}: {register_at(8 * at)}", value)
            for at, value in pairs
        ]

    def _pages(self, batch: PageBatch) -> list[Stale]:
        pfns = batch.pfns[has_data(batch.types)]
        full = np.flatnonzero(batch.pages.view(np.uint64).any(axis=1))
        words = batch.pages[full].view(np.uint64)
        rows, slots = np.nonzero(mfns_in(words, self._first, self._nr))
        tasks = self._tasks() if rows.size else None
        found = []
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            pfn, value = int(pfns[full[row]]), int(words[row, slot])
            assert tasks is not None
            kind, where = tasks.place(pfn, 8 * slot)
            found.append(Stale(kind, where, value, pfn))
        return found


def register_at(offset: int) -> str:
    """Name the register at an offset of a vcpu_guest_context."""
    start = VcpuGuestContext.user_regs.offset
    inside = offset - start
    for name, *_ in UserRegs._fields_:
        field = getattr(UserRegs, name)
        if field.offset == inside:
            return str(name)
    return f"context+{offset:#x}"


def live(found: list[Stale]) -> list[Stale]:
    """Return those that count."""
    return [stale for stale in found if stale.kind != DEAD]
