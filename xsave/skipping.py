"""skipping: which pages of a round are not worth being sent, as the guest wrote to them again.

What is sent and written again before the round is over comes once more, and was sent for nothing.
So a round looks now and then, without cleaning the log, what has got dirty since it was cleaned
(XEN_DOMCTL_SHADOW_OP_PEEK), and leaves that to a later round, or to the stop. Mirrors to_skip of
Xen's first xc_domain_save.c. How fast the dirty frames become more says as well what another
round would bring.
"""

from __future__ import annotations

import time

import numpy as np

from xsave.frames import PAGE_SIZE
from xsave.guest.xen.logdirty import LogDirty

#: To look takes as long as to send some MiB: it is done after so long, then after twice that, and
#: so on; but not sooner than after so many times what it took, and no later than:
_FIRST_S, _PART, _INTERVAL_S = 0.005, 10, 0.02


class Skipping:
    """The frames of a machine of nr_frames that are dirty since `log` was cleaned."""

    def __init__(self, log: LogDirty, nr_frames: int) -> None:
        self._log = log
        self._dirty = np.zeros(nr_frames, bool)
        self._cleaned = self._due = time.monotonic()
        #: How many seconds after the log was cleaned how many bytes were dirty, as far as seen.
        self.growth: list[tuple[float, float]] = [(0.0, 0.0)]

    def cleaned(self, hot: np.ndarray | None = None) -> None:
        """The log was cleaned. hot: frames (n,) i64 that are expected to get dirty again."""
        self._dirty[:] = False
        if hot is not None and self._log.peeks:
            self._dirty[hot] = True
        self._cleaned = time.monotonic()
        self._due = self._cleaned + _FIRST_S
        self.growth = [(0.0, 0.0)]

    def among(self, mfns: np.ndarray) -> np.ndarray:
        """Return which of these frames (n,) are dirty again, (n,) bool, now or some ms ago."""
        began = time.monotonic()
        if self._log.peeks and began >= self._due:
            found = self._log.peek()
            self._dirty[found] = True
            self.growth.append((began - self._cleaned, float(found.size * PAGE_SIZE)))
            now = time.monotonic()
            self._due = now + max(min(began - self._cleaned, _INTERVAL_S), _PART * (now - began))
        return np.asarray(self._dirty[mfns])
