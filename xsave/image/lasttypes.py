"""The final type of every pfn of a stream: what the last PAGE_DATA entry of each one said.

Repeated pfns are how a live migration works, so whoever asks about the image as a whole asks here.
The memory taken grows with the entries in the stream and not with the largest pfn one of them
claims, which may be any number of 52 bits.
"""

from __future__ import annotations

import numpy as np

#: Entries collected before they are merged into the sorted result.
_MERGE_AT = 1 << 20


class LastTypes:
    """Collects (pfns, types) batch by batch; the last one wins, also inside a batch."""

    def __init__(self) -> None:
        self._pfns = np.zeros(0, np.uint64)
        self._types = np.zeros(0, np.uint8)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self._nr_new = 0

    def add(self, pfns: np.ndarray, types: np.ndarray) -> None:
        """Take in one batch: u64 (n,) and u8 (n,)."""
        self._new.append((pfns, types))
        self._nr_new += len(pfns)
        if self._nr_new > max(_MERGE_AT, len(self._pfns)):
            self._merge()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct pfns, ascending, and the final type of each."""
        self._merge()
        return self._pfns, self._types

    def _merge(self) -> None:
        pfns = np.concatenate([self._pfns, *[pfns for pfns, _ in self._new]])
        types = np.concatenate([self._types, *[types for _, types in self._new]])
        order = np.argsort(pfns, kind="stable")
        pfns = pfns[order]
        is_last = np.append(pfns[1:] != pfns[:-1], True)[: len(pfns)]
        self._pfns, self._types = pfns[is_last], types[order][is_last]
        self._new, self._nr_new = [], 0
