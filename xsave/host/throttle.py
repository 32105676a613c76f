"""The brake on a guest whose writes outrun a migration: its vCPUs rest for a part of the time."""

from __future__ import annotations

import time

#: A throttled guest runs and rests once in so long.
PERIOD_S = 0.04
MAX_PERCENT = 99


class Throttle:
    """A duty cycle: of each period the guest may run the first part, the rest it rests.

    It goes by the host's clock. A guest in virtual time notices nothing of it.
    """

    def __init__(self) -> None:
        self.percent = 0

    def rest_s(self) -> float:
        """Return how long the guest has to rest from now on, 0 if it may run."""
        if not self.percent:
            return 0.0
        at = time.monotonic() % PERIOD_S
        runs_s = PERIOD_S * (100 - self.percent) / 100
        return 0.0 if at < runs_s else PERIOD_S - at
