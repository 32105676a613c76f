"""What a restore would have built by the end of the stream: the material of the final checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xsave.frames import PAGE_SIZE
from xsave.image.libxc import TYPE_X86_PV
from xsave.image.stream import Item
from xsave.image.verify.findings import Findings
from xsave.image.verify.frames import Frames
from xsave.image.verify.tables import Tables

#: Xen's limit for PV guests (MAX_VIRT_CPUS).
MAX_VCPUS = 8192


@dataclass
class P2m:
    """The p2m frame list: `pfns` u64, one per p2m page from that of pfn 0 on."""

    max_pfn: int = -1
    pfns: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    offset: int | None = None
    #: A p2m page was seen that holds mfns of the source host.
    holds_mfns: bool = False
    _order: np.ndarray | None = None

    def lay(self, first: int, pfns: np.ndarray) -> bool:
        """Lay a list over the ones before it: a guest that grows while it migrates sends more.

        False if that would leave a gap, which no later list may fill without bound.
        """
        if first > len(self.pfns):
            return False
        end = first + len(pfns)
        self.pfns = np.concatenate([self.pfns[:first], pfns, self.pfns[end:]])
        self._order = None
        return True

    def index_of(self, pfns: np.ndarray) -> np.ndarray:
        """Return which p2m page each of these pfns is: i64, same shape; -1: none."""
        if not len(self.pfns):
            return np.full(len(pfns), -1)
        if self._order is None:
            self._order = np.argsort(self.pfns, kind="stable")
            self._ordered = self.pfns[self._order]
        at = np.minimum(np.searchsorted(self._ordered, pfns), len(self._ordered) - 1)
        return np.where(self._ordered[at] == pfns, self._order[at], -1)


@dataclass(frozen=True)
class KeptPage:
    """The first bytes of a page that could be start_info, and where in the image they are."""

    offset: int
    content: bytes


@dataclass
class Image:
    """The image at its end. `items` holds the last one of each kind but pages and vCPUs."""

    format: str = ""
    guest_type: int = TYPE_X86_PV
    version: int = 3
    guest_width: int = 8
    items: dict[str, Item] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    #: vCPU number -> record name -> item
    vcpus: dict[int, dict[str, Item]] = field(default_factory=dict)
    p2m: P2m = field(default_factory=P2m)
    start_infos: dict[int, KeptPage] = field(default_factory=dict)
    nr_repeated: int = 0
    nr_tables_skipped: int = 0
    frames: Frames = field(init=False)
    tables: Tables = field(init=False)

    @property
    def is_pv(self) -> bool:
        """A PV guest, as opposed to HVM and PVH."""
        return self.guest_type == TYPE_X86_PV

    @property
    def pfns_per_p2m_page(self) -> int:
        """Entries of one p2m page."""
        return PAGE_SIZE // self.guest_width

    @property
    def nr_levels(self) -> int:
        """Levels of the guest's page tables."""
        return 4 if self.guest_width == 8 else 3

    def value(self, name: str) -> Any:
        """Return the last header or record of that name, None if there was none."""
        item = self.items.get(name)
        return item.value if item else None

    def offset(self, name: str) -> int | None:
        """Return where that header or record is, None if there was none."""
        item = self.items.get(name)
        return item.offset if item else None


Check = Callable[[Image, Findings], None]
