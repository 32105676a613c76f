"""postcopy: the pages that were left out of a migration, sent once the guest runs at the target.

    asked for -> at once          the rest -> in order, from where was asked for last

Each page goes once. The source's guest stays suspended meanwhile, its frames are read in place;
after a batch was copied its process is asked whether it still holds it: frames of a domain that
was destroyed or has died may be another's by then.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xsave.errors import XsaveError
from xsave.frames import PAGE_SHIFT
from xsave.guest.xen.domctl import Domctl
from xsave.image import postwire
from xsave.image.buffers import Write
from xsave.progress import Pages, Report, Stage

#: With --bandwidth, so much of a second goes at once: what is asked for waits for no more.
_BATCH_S = 0.02


class LeftOut:
    """The pages of one suspended guest that the other end lacks: pfns, ascending, and their frames,
    both (n,) i64. flush() has on its way what write() was given. nr_faults: what was
    asked for before it was sent."""

    def __init__(
        self,
        domctl: Domctl,
        pfns: np.ndarray,
        mfns: np.ndarray,
        write: Write,
        flush: Callable[[], None],
        report: Report,
        bandwidth: float | None = None,
    ) -> None:
        self._domctl = domctl
        self._pfns, self._mfns = pfns, mfns
        self._write, self._flush = write, flush
        self._report = report
        self._unsent = np.ones(pfns.size, bool)
        self._next = 0
        self._began = False
        batch = postwire.MAX_PAGES
        if bandwidth is not None:
            batch = min(max(int(bandwidth * _BATCH_S) >> PAGE_SHIFT, 1), batch)
        self._batch = batch
        self.nr_pages = pfns.size
        self.nr_sent = self.nr_faults = 0

    def send_wanted(self, pfns: np.ndarray) -> None:
        """Send those of the pfns (n,) that were not sent yet. Raises ConnectionLost,
        GuestStateError, StorageError; ValueError for one that is not to be sent."""
        rows = np.minimum(np.searchsorted(self._pfns, pfns), max(self._pfns.size - 1, 0))
        if not self._pfns.size or (self._pfns[rows] != pfns).any():
            raise ValueError("the other end wants pages that it has")
        self._next = int(rows[-1])
        rows = np.unique(rows[self._unsent[rows]])
        self.nr_faults += rows.size
        for first in range(0, rows.size, self._batch):
            self._send(rows[first : first + self._batch])

    def send_more(self) -> bool:
        """Send some of what is left, False if nothing is; as send_wanted()."""
        if not self._began:
            self._began = True
            detail = f"{np.count_nonzero(self._unsent)} pages follow the guest"
            self._report(Stage("migrate", "post-copy", detail))
        window = self._unsent[self._next :]
        rows = self._next + np.flatnonzero(window)[: self._batch]
        if not rows.size and self._next:
            self._next = 0
            return self.send_more()
        if not rows.size:
            return False
        self._send(rows)
        self._next = int(rows[-1]) + 1
        return True

    def send_end(self) -> None:
        """Say that this was all."""
        self._write([postwire.complete()])
        self._flush()

    def _send(self, rows: np.ndarray) -> None:
        machine, mfns = self._domctl.machine, self._mfns[rows]
        pages = machine.mem[mfns]  # a copy
        try:
            self._domctl.check_held()
        except XsaveError:
            machine.let_go(mfns)
            raise
        self._write(postwire.page_data(self._pfns[rows], pages))
        self._flush()
        self._unsent[rows] = False
        self.nr_sent += rows.size
        nr_bytes = self.nr_sent << PAGE_SHIFT
        self._report(Pages("migrate", self.nr_sent, self.nr_pages, nr_bytes))
