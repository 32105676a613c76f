"""Domain processes as forks (tests/flows/forked.py), of which the newest is the hostile one."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.flows.forked import Forks

_END_S = 60


class HostileForks(Forks):
    """Forks that can be waited for one by one."""

    @property
    def newest(self):
        """The pid of the process started last."""
        return self._children[-1]

    def newest_ends(self):
        """Wait until the newest has ended by itself; return its status, SIGKILL if it does not."""
        pid = self._children.pop()
        deadline = time.monotonic() + _END_S
        while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                return os.waitpid(pid, 0)[1]
            time.sleep(0.002)
        return found[1]


def patched_forks():
    """Forks for a process that is no test: for good."""
    return HostileForks(pytest.MonkeyPatch())
