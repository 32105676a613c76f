"""A domain's memory of which a part stays at the source of its migration until the guest runs.

    the stream's pages -> frames, as ever -> the postponed ones are dropped -> (faults) -> GO

Post-copy: the pages named last in the stream (POSTCOPY_PFNS) are the ones written since they were
sent. Their frames become holes, so that a touch faults, whatever came of them before; of each is
written down which pfn it is (Outstanding), for the process that asks the source for it. Nothing
of the building of the domain may need one of them: page tables, the p2m, start_info and what a
vCPU's context names come with the stream.
"""

from __future__ import annotations

import os
from typing import Self

import numpy as np

from xsave.errors import ImageError
from xsave.frames import INVALID_P2M_ENTRY, PageType
from xsave.guest.xen.domctl import Domctl
from xsave.guest.xen.outstanding import Outstanding
from xsave.image.postcopy import PostcopyPfns
from xsave.placing import NO_PFNS, Memory

_INVALID = np.uint64(INVALID_P2M_ENTRY)


class Postponed:
    """What a post-copy migration's receiver shares with the process that will fetch the pages.

    incoming, outgoing: descriptors of the connection, which stay the caller's.
    """

    def __init__(self, incoming: int, outgoing: int, nr_frames: int) -> None:
        self._connection = incoming, outgoing
        self._tables = Outstanding.create(nr_frames)
        self.outstanding = Outstanding(self._tables)
        #: The stream has named what is postponed, and is through with that.
        self.begun = self.whole = False

    @property
    def descriptors(self) -> tuple[int, int, int]:
        """The connection, both ways, and the tables, as the domain's process wants them."""
        return *self._connection, self._tables

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._tables)


class PostponedMemory(Memory):
    """Memory some pages of which come later."""

    def __init__(self, domctl: Domctl, p2m_size: int, share: Postponed) -> None:
        super().__init__(domctl, p2m_size, live=True)
        self._share = share
        self._later = np.zeros(p2m_size, bool)

    def grow(self, p2m_size: int) -> None:
        super().grow(p2m_size)
        self._later = np.append(self._later, np.zeros(p2m_size - self._later.size, bool))

    def postpone(self, pfns: np.ndarray, offset: int) -> None:
        """Take the pfns (n,) of a record at this offset. Raises ImageError."""
        if (pfns >= np.uint64(self.p2m.size)).any():
            self._refuse(int(pfns.max()), "lies outside the p2m", offset)
        self.place_types(pfns, np.full(pfns.size, PageType.XALLOC, np.uint8))
        self._later[pfns] = True

    def _refuse(self, pfn: int, why: str, offset: int | None = None) -> None:
        raise ImageError(
            f"pfn {pfn:#x}, which is to come later, {why}", offset=offset, record=PostcopyPfns.NAME
        )

    def have(self, pfns: np.ndarray) -> None:
        self._require_here(pfns)

    def _require_here(self, pfns: np.ndarray) -> None:
        if (late := pfns[self._later[pfns]]).size:
            self._refuse(int(late[0]), "is needed before the guest can start")

    def complete(self, but: np.ndarray = NO_PFNS) -> None:
        super().complete(but)
        self._require_here(but.astype(np.int64))
        pfns = np.flatnonzero(self._later & (self.types == PageType.NOTAB))
        if pfns.size != np.count_nonzero(self._later):
            self._refuse(int(np.flatnonzero(self._later)[0]), "came again as something else")
        mfns = self.p2m[pfns]
        self._machine.drop(mfns)
        self._share.outstanding.put(mfns.astype(np.intp), pfns.astype(np.uint64))

    def serve(self) -> None:
        if self._share.begun:
            self._domctl.fill()
