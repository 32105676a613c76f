"""What the toolstack sees of a guest's memory: which frame each pfn has, and what it is used as.

All of it at once for a save. Of a guest that runs on, all of it once, and from then on what may
have changed, by the frames that the log of dirty frames names: the p2m's own pages among them tell
which entries, the others, by m2p, which pfns. So the last look, for which the guest stands still,
does not take longer the larger the guest is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xsave import p2m as guest_p2m
from xsave.distinct import distinct
from xsave.frames import INVALID_P2M_ENTRY, PageType
from xsave.guest.xen.domctl import Domctl
from xsave.p2m import PER_PAGE, Located
from xsave.public import SharedInfo

_INVALID = np.uint64(INVALID_P2M_ENTRY)


def page_types(domctl: Domctl, p2m: np.ndarray) -> np.ndarray:
    """Return the types, (n,) u8, of the pages of these p2m entries: XTAB for holes."""
    backed = p2m != _INVALID
    types = domctl.page_types(np.where(backed, p2m, np.uint64(0)))
    types[~backed] = PageType.XTAB
    return types


@dataclass(frozen=True)
class Changes:
    """What a look found, pfns (n,) i64, none twice: `written` have a dirty frame; `other`, which
    ascend, may have another frame or another type than before."""

    written: np.ndarray
    other: np.ndarray


class View:
    """A running domain's p2m (n,) u64, with INVALID_P2M_ENTRY for holes, its page types (n,) u8,
    XTAB for holes, and the pfns of the p2m's pages and of its frame lists, as last looked at."""

    def __init__(self, domctl: Domctl) -> None:
        self._domctl = domctl
        self._machine = domctl.machine
        self._located: Located | None = None
        self._pfns = np.full(self._machine.nr_frames, -1)  # of the frames of p2m
        self.p2m = np.empty(0, np.uint64)
        self.types = np.empty(0, np.uint8)
        self.frames = self.list_frames = np.empty(0, np.int64)

    def look(self, shared: SharedInfo, dirty: np.ndarray) -> Changes:
        """Look again, at what these frames (n,) i64 say may have changed; at everything if the
        guest has another p2m than before. Raises GuestStateError, and can be called again then
        with the same frames."""
        located = guest_p2m.locate(self._domctl, shared)
        if self._is_the_same(located):
            other = self._candidates(located, dirty)
        else:
            self._resize(located.size)
            other = np.arange(located.size)
        self._located = None  # what fails from here on has seen a part
        self._update(located, other)
        frames, lists = guest_p2m.pages(self._domctl, located, self.p2m)
        self.frames, self.list_frames = frames.astype(np.int64), lists.astype(np.int64)
        self._located = located
        written = self._pfns[dirty]
        return Changes(written[written >= 0], other)

    def _is_the_same(self, located: Located) -> bool:
        old = self._located
        return (
            old is not None
            and old.size == located.size
            and np.array_equal(old.leaves, located.leaves)
        )

    def _resize(self, size: int) -> None:
        cut = self.p2m[size:]
        self._pfns[cut[cut != _INVALID].view(np.int64)] = -1
        more = max(size - self.p2m.size, 0)
        self.p2m = np.append(self.p2m[:size], np.full(more, _INVALID))
        self.types = np.append(self.types[:size], np.full(more, PageType.XTAB, np.uint8))

    def _candidates(self, located: Located, dirty: np.ndarray) -> np.ndarray:
        """Return the pfns whose entry is in a dirty page, or whose frame, by what was seen before
        or by m2p, is dirty."""
        rows = np.flatnonzero(np.isin(located.leaves.view(np.int64), dirty, kind="sort"))
        entries = (rows[:, None] * PER_PAGE + np.arange(PER_PAGE)).reshape(-1)
        now = self._machine.m2p[dirty].view(np.int64)
        pfns = distinct((entries, self._pfns[dirty], now))
        return pfns[(pfns >= 0) & (pfns < located.size)]

    def _update(self, located: Located, pfns: np.ndarray) -> None:
        old, new = self.p2m[pfns], guest_p2m.read(self._domctl, located, pfns)
        left = (old != new) & (old != _INVALID)
        frames = old[left].view(np.int64)
        self._pfns[frames[self._pfns[frames] == pfns[left]]] = -1
        backed = new != _INVALID
        self._pfns[new[backed].view(np.int64)] = pfns[backed]
        self.p2m[pfns] = new
        self.types[pfns] = page_types(self._domctl, new)
