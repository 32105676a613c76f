"""The final state of every pfn: its last type, and where in the image its entry is.

What a PAGE_DATA entry costs here is bounded by what it costs in the image (16 bytes for its 8),
whatever pfn it names: nothing is indexed by pfn until the pfns are known to be dense.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from xsave.frames import PageType
from xsave.image.pages import MAX_PFN, has_data

#: The type of a pfn that never came.
ABSENT = 16
_TYPE_SHIFT = np.uint64(60)
_PFN_MASK = np.uint64(MAX_PFN)
#: Entries that may wait before they are merged.
_SLACK = 1 << 20


@dataclass(frozen=True)
class Frames:
    """`pfns` u64 (n,) ascending, `types` u8 (n,), `offsets` u64 (n,) of the last entries."""

    pfns: np.ndarray
    types: np.ndarray
    offsets: np.ndarray

    @cached_property
    def _dense(self) -> np.ndarray | None:
        """Types indexed by pfn, where that takes no more room than the entries took."""
        size = int(self.pfns[-1]) + 1 if len(self.pfns) else 0
        if size > 8 * len(self.pfns) + _SLACK:
            return None
        dense = np.full(size, ABSENT, np.uint8)
        dense[self.pfns] = self.types
        return dense

    def types_of(self, pfns: np.ndarray) -> np.ndarray:
        """Return the final types of u64 pfns: u8, same shape; ABSENT for those that never came."""
        if not len(self.pfns):
            return np.full(len(pfns), ABSENT, np.uint8)
        if self._dense is not None:
            last = np.uint64(len(self._dense) - 1)
            return np.where(pfns <= last, self._dense[np.minimum(pfns, last)], np.uint8(ABSENT))
        at = np.minimum(np.searchsorted(self.pfns, pfns), len(self.pfns) - 1)
        return np.where(self.pfns[at] == pfns, self.types[at], np.uint8(ABSENT))

    def type_of(self, pfn: int) -> int:
        """Return the final type of one pfn."""
        return int(self.types_of(np.array([min(pfn, MAX_PFN)], np.uint64))[0])

    def offset_of(self, pfn: int) -> int | None:
        """Return where the entry of a pfn is, None if it never came."""
        at = int(np.searchsorted(self.pfns, np.uint64(pfn)))
        found = at < len(self.pfns) and int(self.pfns[at]) == pfn
        return int(self.offsets[at]) if found else None

    @property
    def populated(self) -> np.ndarray:
        """The pfns that have a frame on the target (all but XTAB and BROKEN): u64, ascending."""
        pfns: np.ndarray = self.pfns[has_data(self.types) | (self.types == PageType.XALLOC)]
        return pfns


@dataclass
class FrameLog:
    """Takes the entries as they come; the last entry of a pfn wins."""

    nr_repeated: int = 0
    _entries: list[np.ndarray] = field(default_factory=list)
    _offsets: list[np.ndarray] = field(default_factory=list)
    _nr_merged: int = 0
    _nr_waiting: int = 0

    def add(self, pfns: np.ndarray, types: np.ndarray, offset: int) -> None:
        """Take one batch whose first entry is at `offset` of the image."""
        self._entries.append(pfns | (types.astype(np.uint64) << _TYPE_SHIFT))
        self._offsets.append(np.uint64(offset) + np.arange(len(pfns), dtype=np.uint64) * 8)
        self._nr_waiting += len(pfns)
        if self._nr_waiting > self._nr_merged + _SLACK:
            self._merge()

    def _merge(self) -> None:
        if not self._entries:
            return
        entries, offsets = np.concatenate(self._entries), np.concatenate(self._offsets)
        order = np.argsort(entries & _PFN_MASK, kind="stable")
        pfns = entries[order] & _PFN_MASK
        last = order[np.append(pfns[1:] != pfns[:-1], True)]
        self.nr_repeated += len(entries) - len(last)
        self._entries, self._offsets = [entries[last]], [offsets[last]]
        self._nr_merged, self._nr_waiting = len(last), 0

    def finish(self) -> Frames:
        """Return the final state of every pfn that came."""
        self._merge()
        entries = self._entries[0] if self._entries else np.zeros(0, np.uint64)
        offsets = self._offsets[0] if self._offsets else np.zeros(0, np.uint64)
        return Frames(entries & _PFN_MASK, (entries >> _TYPE_SHIFT).astype(np.uint8), offsets)
