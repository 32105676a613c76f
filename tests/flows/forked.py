"""Domain processes without the start of an interpreter, so that a test can afford thousands.

They are forks of the test process and run what `python -m xsave.host.process` runs. For guests
that stay paused: nothing here ever loads the emulator.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from tests.flows.flow import all_free
from xsave.frames import INVALID_M2P_ENTRY
from xsave.guest.xen.machine import DOMID_FREE
from xsave.host import process, spawn
from xsave.restore import restore as restore_flow


class Forks:
    """Stands in for subprocess.Popen in xsave.host.spawn; knows its children."""

    def __init__(self, monkeypatch):
        self._children = []
        monkeypatch.setattr(spawn, "subprocess", SimpleNamespace(Popen=self._popen, DEVNULL=None))

    def _popen(self, command, *, stdout, **_):
        pid = os.fork()
        if pid == 0:
            run_child(command[command.index(spawn.PROCESS_MODULE) + 1 :], stdout.fileno())
        self._children.append(pid)

    def all_end(self, seconds=10):
        """Assert that every child ends by itself, without a complaint."""
        deadline = time.monotonic() + seconds
        for pid in self._children:
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                assert time.monotonic() < deadline, f"domain process {pid} does not end"
                time.sleep(0.001)
        self._children.clear()


def run_child(arguments, log):
    """Be a domain process."""
    status = 1
    try:
        os.setsid()
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w")
        process.main(arguments)
        status = 0
    finally:
        os._exit(status)


class BytesSource:
    """A source of bytes in memory."""

    def __init__(self, data):
        self._data = memoryview(data)
        self.position = 0

    def read(self, n):
        piece = self._data[self.position : self.position + n]
        self.position += len(piece)
        return piece

    def zero_pages(self, offset, nr_pages):
        return None


def restore(host, data, **options):
    """Restore an image from bytes, paused."""
    return restore_flow(
        BytesSource(data),
        lambda name, _: spawn.spawn(host, name),
        nr_frames=host.nr_frames,
        paused=True,
        **options,
    )


def nothing_is_left(host, forks):
    """Assert that no domain, no frame and no process is left, quickly."""
    assert list(Path(host.directory / "domains").iterdir()) == []
    forks.all_end()
    machine = host.machine
    frames = slice(machine.first_frame, None)
    assert host.free_frames == all_free(host)
    assert (machine.owner[frames] == DOMID_FREE).all()
    assert (machine.m2p[frames] == INVALID_M2P_ENTRY).all()
    for column in (machine.page_type, machine.pinned, machine.type_count, machine.refs):
        assert not column[frames].any()
