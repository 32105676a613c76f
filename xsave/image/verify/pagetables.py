"""Check the guest's page tables: what Xen's validation and the guest itself would stumble over.

Xen validates a table when it is pinned or loaded as cr3 or cr1, and everything below it. Tables
that none of these reach are not validated (their types are stale), so no rule but `pte-range`
applies to them. Which flags a guest may set: the *_DISALLOW_MASKs of xen/arch/x86/mm.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from xsave.frames import (
    PTE_GLOBAL,
    PTE_PCD,
    PTE_PSE,
    PTE_PWT,
    PTE_RW,
    TYPE_PIN,
    PageType,
)
from xsave.image.libxc import PageBatch
from xsave.image.verify.context import paging_of
from xsave.image.verify.findings import Findings
from xsave.image.verify.model import Image
from xsave.image.verify.tables import LEVELS, Entries, Tables, frames_of

_RW = np.uint64(PTE_RW)
#: Bit 7 is PAT at L1 and PSE above; GLOBAL is allowed at L1 only.
_L1_DISALLOWED = np.uint64(PTE_PWT | PTE_PCD | PTE_PSE)
_L2_DISALLOWED = np.uint64(PTE_PWT | PTE_PCD | PTE_PSE | PTE_GLOBAL)


@dataclass
class _Tally:
    """The first entry that breaks a rule, and how many do."""

    count: int = 0
    row: int = 0
    slot: int = 0
    pte: int = 0

    def take(self, entries: Entries, breach: np.ndarray) -> None:
        """Count the entries where `breach` (bool) is set."""
        at = np.flatnonzero(breach)
        if len(at) and not self.count:
            self.row, self.slot = int(entries.rows[at[0]]), int(entries.slots[at[0]])
            self.pte = int(entries.ptes[at[0]])
        self.count += len(at)


@dataclass
class _Context:
    """What the rules look at beside the entries themselves."""

    image: Image
    reached: np.ndarray
    gdt_frames: np.ndarray
    tallies: dict[str, _Tally] = field(default_factory=dict)

    def is_table(self, pfns: np.ndarray, types: np.ndarray) -> np.ndarray:
        """Return which pfns are tables that Xen validates: bool, same shape."""
        found: np.ndarray = LEVELS[types] > 0
        rows = self.image.tables.rows_of(pfns[found])
        found[found] = self.reached[rows] & (rows >= 0)
        return found

    def tally(self, rule: str, entries: Entries, breach: np.ndarray) -> None:
        """Count breaches of a rule."""
        self.tallies.setdefault(rule, _Tally()).take(entries, breach)


def check(image: Image, findings: Findings) -> None:
    """Check every entry of every table that Xen would validate."""
    tables = image.tables
    reached = tables.reached_from(_roots(image))
    context = _Context(image, reached, _gdt_frames(image))
    for entries in tables.chunks():
        _check_chunk(context, entries)
    for rule, tally in context.tallies.items():
        if tally.count:
            _tell(image, findings, rule, tally)
    _tell_unused(tables, reached, findings)
    if image.nr_tables_skipped:
        text = f"{image.nr_tables_skipped} page tables"
        findings.add("tables-skipped", text, record=PageBatch.NAME)


def _roots(image: Image) -> np.ndarray:
    """Return the pfns of pinned tables and of those that vCPUs have loaded."""
    pinned = (LEVELS[image.frames.types] > 0) & (image.frames.types & TYPE_PIN > 0)
    loaded = [pfn for paging in paging_of(image).values() for pfn in paging.roots]
    return np.concatenate([image.frames.pfns[pinned], np.array(loaded, np.uint64)])


def _gdt_frames(image: Image) -> np.ndarray:
    frames = {pfn for paging in paging_of(image).values() for pfn in paging.gdt_frames}
    return np.array(sorted(frames), np.uint64)


def _check_chunk(context: _Context, entries: Entries) -> None:
    image = context.image
    targets = frames_of(entries.ptes)
    in_play = context.reached[entries.rows] & (targets <= np.uint64(max(image.p2m.max_pfn, 0)))
    entries = Entries(*(column[in_play] for column in entries))
    targets = targets[in_play]
    types = image.frames.types_of(targets)
    levels = image.tables.levels[entries.rows]
    is_writable = (entries.ptes & _RW) != 0
    _check_flags(context, entries, levels)
    _check_levels(context, entries, levels, LEVELS[types], is_writable)
    is_l1 = levels == 1
    is_protected = context.is_table(targets, types) | np.isin(targets, context.gdt_frames)
    context.tally("pte-writable", entries, is_l1 & is_writable & is_protected)
    is_hole = (types == PageType.XTAB) | (types == PageType.BROKEN)
    context.tally("pte-hole", entries, is_l1 & is_hole)


def _check_flags(context: _Context, entries: Entries, levels: np.ndarray) -> None:
    disallowed = np.where(levels == 1, _L1_DISALLOWED, _L2_DISALLOWED)
    context.tally("pte-flags", entries, (entries.ptes & disallowed) != 0)


def _check_levels(
    context: _Context,
    entries: Entries,
    levels: np.ndarray,
    target_levels: np.ndarray,
    is_writable: np.ndarray,
) -> None:
    is_wrong = (levels > 1) & (target_levels != levels - 1)
    is_linear = is_wrong & (target_levels == levels) & ~is_writable
    context.tally("pte-linear", entries, is_linear)
    context.tally("pte-level", entries, is_wrong & ~is_linear)


def _type_name(page_type: int) -> str:
    known = page_type in PageType.__members__.values()
    return PageType(page_type).name if known else "one that never came"


_MESSAGES: dict[str, Callable[[int, str], str]] = {
    "pte-flags": lambda level, kind: "flags no guest may set",
    "pte-level": lambda level, kind: f"expected a table of level {level - 1}, found {kind}",
    "pte-linear": lambda level, kind: f"a table of its own level, {kind}",
    "pte-writable": lambda level, kind: f"a writable mapping of {kind}",
    "pte-hole": lambda level, kind: f"a page without content, {kind}",
}


def _tell(image: Image, findings: Findings, rule: str, tally: _Tally) -> None:
    tables = image.tables
    pfn, level = int(tables.pfns[tally.row]), int(tables.levels[tally.row])
    target = int(frames_of(np.array([tally.pte], np.uint64))[0])
    kind = _type_name(image.frames.type_of(target))
    findings.add(
        rule,
        f"entry {tally.slot} of the L{level} table at pfn {pfn:#x} is {tally.pte:#x} "
        f"(pfn {target:#x}): {_MESSAGES[rule](level, kind)}",
        record=PageBatch.NAME,
        offset=int(tables.offsets[tally.row]) + 8 * tally.slot,
        more=tally.count - 1,
    )


def _tell_unused(tables: Tables, reached: np.ndarray, findings: Findings) -> None:
    unused = np.flatnonzero(~reached)
    if len(unused):
        text = f"the L{tables.levels[unused[0]]} table at pfn {tables.pfns[unused[0]]:#x}"
        offset = int(tables.offsets[unused[0]])
        findings.add(
            "table-unused", text, record=PageBatch.NAME, offset=offset, more=len(unused) - 1
        )
