"""Look at the pages of a PV guest as they pass by, and keep the few that the final checks need.

Kept are the present entries of page tables, and the head of every page that could be start_info:
it says so itself, but which of them it is, only vCPU 0's rdx tells, and that comes last. Other
pages are not touched beyond their first eight bytes, and not at all where the caller knows them
to be holes. A few things are checked here as they hold for every version of a page, also for one
that a later batch replaces.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xsave.frames import INVALID_P2M_ENTRY, PAGE_SIZE, XEN_L4_SLOTS
from xsave.image.pages import PageBatch
from xsave.image.verify.findings import Findings
from xsave.image.verify.model import Image, KeptPage
from xsave.image.verify.tables import LEVELS, TableLog, frames_of

#: zero_pages(offset, n): which of the n pages there are known to be zero (bool); None: unknown.
ZeroPages = Callable[[int, int], np.ndarray | None]

START_INFO_BYTES = 1168
_START_INFO_HEAD = int.from_bytes(b"xen-3.0-", "little")
#: Pages kept that may be start_info.
_MAX_START_INFOS = 1024


class PvPages:
    """Takes batches, fills `image.start_infos` and its own `tables`."""

    def __init__(self, image: Image, findings: Findings, zero_pages: ZeroPages | None) -> None:
        self.tables = TableLog()
        self._image = image
        self._findings = findings
        self._zero_pages = zero_pages

    def take(self, batch: PageBatch) -> None:
        """Take one batch."""
        has_data = batch.has_data
        pfns, levels = batch.pfns[has_data], LEVELS[batch.types[has_data]]
        if len(at := np.flatnonzero(levels)):
            self._take_tables(batch, at, pfns[at], levels[at])
        at = self._touchable(batch, np.flatnonzero(levels == 0), len(pfns))
        self._take_start_infos(batch, pfns, at)
        self._look_at_p2m(batch, pfns, at)

    def _touchable(self, batch: PageBatch, at: np.ndarray, nr_pages: int) -> np.ndarray:
        """Return those of the pages `at` that are not known to be zero."""
        zero = self._zero_pages(batch.pages_offset, nr_pages) if self._zero_pages else None
        touchable: np.ndarray = at if zero is None else at[~zero[at]]
        return touchable

    def _take_tables(
        self, batch: PageBatch, at: np.ndarray, pfns: np.ndarray, levels: np.ndarray
    ) -> None:
        content = batch.pages[at].view("<u8")
        offsets = (batch.pages_offset + at * PAGE_SIZE).astype(np.uint64)
        self._clear_foreign_slots(content, pfns, levels, offsets)
        rows, slots, ptes = self.tables.add(pfns, levels, offsets, content)
        max_pfn = self._image.p2m.max_pfn
        if max_pfn < 0 or not len(beyond := np.flatnonzero(frames_of(ptes) > np.uint64(max_pfn))):
            return
        row, slot = rows[beyond[0]], int(slots[beyond[0]])
        self._findings.add(
            "pte-range",
            f"entry {slot} of the L{levels[row]} table at pfn {pfns[row]:#x} names pfn "
            f"{frames_of(ptes[beyond[0]]):#x}, the last one is {max_pfn:#x}",
            record=batch.NAME,
            offset=int(offsets[row]) + 8 * slot,
            more=len(beyond) - 1,
        )

    def _clear_foreign_slots(
        self, content: np.ndarray, pfns: np.ndarray, levels: np.ndarray, offsets: np.ndarray
    ) -> None:
        """Clear what is not the guest's: Xen's own L4 slots, all but 4 entries of a PAE L3."""
        if self._image.nr_levels == 3:
            content[levels == 3, 4:] = 0
            return
        tops = np.flatnonzero(levels == 4)
        first, last = XEN_L4_SLOTS
        slots = content[tops, first : last + 1]
        if not slots.any():
            return
        row, slot = np.argwhere(slots)[0].tolist()
        text = f"entry {first + slot} of the L4 table at pfn {pfns[tops[row]]:#x} is not 0"
        offset = int(offsets[tops[row]]) + 8 * (first + slot)
        self._findings.add("l4-xen-slots", text, record=PageBatch.NAME, offset=offset)
        # Those that name a pfn behind the p2m stay: libxc aborts before Xen replaces them.
        is_in_range = frames_of(slots) <= np.uint64(max(self._image.p2m.max_pfn, 0))
        content[tops, first : last + 1] = np.where(is_in_range, 0, slots)

    def _take_start_infos(self, batch: PageBatch, pfns: np.ndarray, at: np.ndarray) -> None:
        kept = self._image.start_infos
        for pfn in set(kept).intersection(pfns.tolist()) if kept else ():
            del kept[pfn]
        heads = np.ascontiguousarray(batch.pages[at, :8]).view("<u8")[:, 0]
        for i in at[heads == _START_INFO_HEAD].tolist():
            if len(kept) < _MAX_START_INFOS:
                content = batch.pages[i, :START_INFO_BYTES].tobytes()
                kept[int(pfns[i])] = KeptPage(batch.pages_offset + PAGE_SIZE * i, content)

    def _look_at_p2m(self, batch: PageBatch, pfns: np.ndarray, at: np.ndarray) -> None:
        """Note, once, a p2m page with an entry that is neither empty nor the pfn itself."""
        if self._image.p2m.holds_mfns:
            return
        index = self._image.p2m.index_of(pfns[at])
        at, index = at[index >= 0], index[index >= 0]
        width = self._image.guest_width
        entries = batch.pages[at].view(f"<u{width}").astype(np.uint64)
        nothing = INVALID_P2M_ENTRY & ((1 << 8 * width) - 1)
        per_page = self._image.pfns_per_p2m_page
        own = (index[:, None] * per_page + np.arange(per_page)).astype(np.uint64)
        is_mfn = (entries != 0) & (entries != np.uint64(nothing)) & (entries != own)
        if is_mfn.any():
            self._image.p2m.holds_mfns = True
            row, slot = np.argwhere(is_mfn)[0].tolist()
            offset = batch.pages_offset + PAGE_SIZE * int(at[row]) + width * slot
            text = f"the p2m page at pfn {pfns[at[row]]:#x} holds frame numbers"
            self._findings.add("host-frames", text, record=batch.NAME, offset=offset)
