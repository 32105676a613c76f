"""A slow model of Xen's page types: plain dictionaries, whole-state rollback, no cleverness.

It says what every request must answer and what types, counts and references must be afterwards.
`recount` derives the counts from nothing but the tables' contents.
"""

from __future__ import annotations

import copy
import errno
from collections import Counter

from xsave.frames import (
    PTE_GLOBAL,
    PTE_PCD,
    PTE_PRESENT,
    PTE_PSE,
    PTE_PWT,
    PTE_RW,
    PTE_USER,
)
from xsave.guest.xen.pagetypes import PGT_L1, PGT_L4, PGT_NONE, PGT_SEG_DESC, PGT_WRITABLE

XEN_SLOTS = range(256, 272)
FRAME = 0x000F_FFFF_FFFF_F000
FORBIDDEN = dict.fromkeys((2, 3, 4), PTE_PSE | PTE_PWT | PTE_PCD | PTE_GLOBAL)
FORBIDDEN[PGT_L1] = PTE_PSE | PTE_PWT | PTE_PCD
REFUSED = -errno.EINVAL
#: What Xen puts into every L4 of the tests.
XEN_ENTRIES = {256: 1 << 12 | 0x25, 257: 3 << 12 | 0x63}
CODE = 0x00AFFB000000FFFF  # a present code descriptor of DPL 3


class Refusal(Exception):
    """The request is refused; whatever it did so far did not happen."""

    def __init__(self, rc: int) -> None:
        super().__init__()
        self.rc = rc


class Model:
    """The frames a domain may name, with their type, count, references, pin and contents."""

    def __init__(self, frames: list[int], xen_entries: dict[int, int], nr_frames: int) -> None:
        self.xen_entries = xen_entries
        self.nr_frames = nr_frames  # of the machine
        self.type = dict.fromkeys(frames, PGT_NONE)
        self.count = dict.fromkeys(frames, 0)
        self.refs = dict.fromkeys(frames, 0)
        self.pinned = dict.fromkeys(frames, False)
        self.content: dict[int, dict[int, int]] = {mfn: {} for mfn in frames}

    def attempt(self, request, *args) -> int:
        """Do a request wholly or not at all: 0, or a negative errno."""
        before = copy.deepcopy(self.__dict__)
        try:
            request(*args)
        except Refusal as refusal:
            self.__dict__ = before
            return refusal.rc
        return 0

    def require(self, condition, rc: int = REFUSED) -> None:
        if not condition:
            raise Refusal(rc)

    # -- requests ---

    def take(self, mfn: int, want: int) -> None:
        self.require(mfn in self.type)
        if self.count[mfn]:
            self.require(self.type[mfn] == want)
            self.count[mfn] += 1
            return
        self.type[mfn], self.count[mfn] = want, 1
        if PGT_L1 <= want <= PGT_L4:
            for slot, entry in self.guests_entries(mfn, want):
                self.content[mfn][slot] = entry | PTE_USER
                self.link(entry, want)
            if want == PGT_L4:
                for slot in XEN_SLOTS:
                    self.content[mfn][slot] = self.xen_entries.get(slot, 0)
        elif want == PGT_SEG_DESC:
            self.descriptors(mfn)

    def drop(self, mfn: int) -> None:
        self.count[mfn] -= 1
        if self.count[mfn]:
            return
        was, self.type[mfn] = self.type[mfn], PGT_NONE
        if PGT_L1 <= was <= PGT_L4:
            for _, entry in self.guests_entries(mfn, was):
                self.unlink(entry, was)
        if was == PGT_L4:
            for slot in XEN_SLOTS:
                self.content[mfn][slot] = 0

    def update(self, mfn: int, slot: int, entry: int, preserve_ad: bool) -> None:
        self.require(mfn in self.type)
        level = self.type[mfn]
        if not (self.count[mfn] and PGT_L1 <= level <= PGT_L4):
            self.take(mfn, PGT_WRITABLE)
            self.content[mfn][slot] = entry
            self.drop(mfn)
            return
        self.require(not (level == PGT_L4 and slot in XEN_SLOTS))
        old = self.content[mfn].get(slot, 0)
        if preserve_ad:
            entry |= old & 0x60
        if entry & PTE_PRESENT:
            entry |= PTE_USER
            self.link(entry, level)
        self.content[mfn][slot] = entry
        if old & PTE_PRESENT:
            self.unlink(old, level)

    def pin(self, mfn: int, level: int) -> None:
        self.require(mfn in self.type and not self.pinned[mfn])
        self.take(mfn, level)
        self.pinned[mfn] = True

    def unpin(self, mfn: int) -> None:
        self.require(mfn in self.type and self.pinned[mfn])
        self.pinned[mfn] = False
        self.drop(mfn)

    # -- entries ---

    def guests_entries(self, mfn: int, level: int) -> list[tuple[int, int]]:
        return [
            (slot, entry)
            for slot, entry in sorted(self.content[mfn].items())
            if entry & PTE_PRESENT and not (level == PGT_L4 and slot in XEN_SLOTS)
        ]

    def link(self, entry: int, level: int) -> None:
        target = (entry & FRAME) >> 12
        self.require(not entry & FORBIDDEN[level])
        if level > PGT_L1:
            self.take(target, level - 1)
        else:
            self.require(target in self.type, no_page(target, self.nr_frames))
            writable = self.type[target] == PGT_WRITABLE or not self.count[target]
            self.require(writable or not entry & PTE_RW, -errno.EBUSY)
            if entry & PTE_RW:
                self.take(target, PGT_WRITABLE)
        self.refs[target] += 1

    def unlink(self, entry: int, level: int) -> None:
        target = (entry & FRAME) >> 12
        self.refs[target] -= 1
        if level > PGT_L1 or entry & PTE_RW:
            self.drop(target)

    def descriptors(self, mfn: int) -> None:
        present = {s: d for s, d in self.content[mfn].items() if d >> 47 & 1}
        self.require(all(d >> 44 & 1 or not d >> 40 & 15 for d in present.values()))
        segments = {slot: d | 3 << 45 for slot, d in present.items() if d >> 44 & 1}
        self.content[mfn] |= segments


def no_page(mfn: int, nr_frames: int) -> int:
    """What an L1 entry is refused with that names another's frame, or none."""
    if mfn < nr_frames:
        return -errno.EBUSY
    return -errno.EINVAL if mfn == FRAME >> 12 else -errno.EPERM


def recount(machine, frames: list[int]) -> tuple[Counter, Counter]:
    """Return (type uses, references) of every frame named by the tables in use among `frames`.

    Fails if an entry names a frame outside them, or maps a table or descriptors writable.
    """
    uses: Counter = Counter()
    refs: Counter = Counter()
    for mfn in frames:
        level = int(machine.page_type[mfn])
        if not (machine.type_count[mfn] and PGT_L1 <= level <= PGT_L4):
            continue
        row = machine.mem[mfn]
        for slot in (row & 1).nonzero()[0].tolist():
            if level == PGT_L4 and slot in XEN_SLOTS:
                continue
            entry = int(row[slot])
            target = (entry & FRAME) >> 12
            assert target in frames, f"frame {mfn:#x} slot {slot} names frame {target:#x}"
            assert not entry & FORBIDDEN[level]
            assert entry & PTE_USER
            refs[target] += 1
            if level > PGT_L1:
                assert machine.page_type[target] == level - 1
                uses[target] += 1
            elif entry & PTE_RW:
                assert machine.page_type[target] == PGT_WRITABLE, f"{target:#x} is a table"
                uses[target] += 1
    return uses, refs
