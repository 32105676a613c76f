"""The processes behind a domain whose memory is still coming: a guard, and who brings the pages."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.flows.flow import processes, wait_for


def only_process(host):
    """Return the pid of the one domain process, whoever its children are."""
    pids = processes(host)
    return next(pid for pid in pids if _parent(pid) not in pids)


def _parent(pid):
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])
    return None


def child(host, parent):
    """Return the pid of a domain process that another one started, None if there is none."""
    return next((pid for pid in processes(host) if _parent(pid) == parent), None)


def guard(host):
    """Return the pid of the process that stands guard, None if all has come."""
    return child(host, only_process(host))


def filler(host):
    """Return the pid of the process that brings the pages."""
    return wait_for(lambda: child(host, guard(host)))
