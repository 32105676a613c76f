"""The records that make a libxc stream the first part of a post-copy migration.

    ... X86_PV_P2M_FRAMES POSTCOPY_BEGIN PAGE_DATA ... POSTCOPY_PFNS_BEGIN { POSTCOPY_PFNS } ...
    POSTCOPY_TRANSITION END

The pages of the pfns in POSTCOPY_PFNS are still at the source when the guest starts (postwire.py
has what follows, and says where names and numbers are from). So it is no image: only the
migrate-receive that was started for such a migration reads it, and all others refuse it at
POSTCOPY_BEGIN, before any page.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xsave.image import order, postwire
from xsave.image.record import Record, layout, u32, u64s

#: Pfns of one record; a reader takes any number that fits into one.
MAX_PFNS = 1 << 16


@dataclass(frozen=True)
class PostcopyBegin(Record):
    """Some pages will follow behind the guest."""

    TYPE, NAME, LAYOUT = postwire.BEGIN, postwire.NAMES[postwire.BEGIN], layout()


@dataclass(frozen=True)
class PostcopyPfnsBegin(Record):
    """The guest is suspended; what is still to come is named from here on."""

    TYPE, NAME, LAYOUT = postwire.PFNS_BEGIN, postwire.NAMES[postwire.PFNS_BEGIN], layout()


@dataclass(frozen=True, eq=False)
class PostcopyPfns(Record):
    """Ordinary pages that will follow: whatever came of them counts for nothing."""

    TYPE, NAME = postwire.PFNS, postwire.NAMES[postwire.PFNS]
    LAYOUT = layout(count=u32, reserved=u32, pfns=u64s)

    count: int
    reserved: int
    pfns: np.ndarray

    def check(self, offset: int) -> None:
        """Refuse a list of another length than it says."""
        if self.count != len(self.pfns) or not self.count:
            self.refuse(offset, "wrong number of pfns", self.count, len(self.pfns))

    @classmethod
    def of(cls, pfns: np.ndarray) -> PostcopyPfns:
        return cls(pfns.size, 0, pfns.astype(np.uint64))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PostcopyPfns) and self.encode() == other.encode()

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class PostcopyTransition(Record):
    """The guest may start as soon as it is handed over."""

    TYPE, NAME, LAYOUT = postwire.TRANSITION, postwire.NAMES[postwire.TRANSITION], layout()


RECORDS: dict[int, type[Record]] = {
    cls.TYPE: cls for cls in (PostcopyBegin, PostcopyPfnsBegin, PostcopyPfns, PostcopyTransition)
}
_BEGIN, _PFNS_BEGIN, _PFNS, _TRANSITION = (cls.NAME for cls in RECORDS.values())
ORDER: dict[str, order.Rule] = {
    _BEGIN: order.Rule(after=("X86_PV_P2M_FRAMES",), once=True),
    _PFNS_BEGIN: order.Rule(after=(_BEGIN,), once=True),
    _PFNS: order.Rule(after=(_PFNS_BEGIN,)),
    _TRANSITION: order.Rule(after=(_PFNS_BEGIN,), once=True),
}
