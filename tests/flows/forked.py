"""Domain processes without the start of an interpreter, so that a test can afford thousands.

They are forks of the test process and run what `python -m xsave.host.process` runs. For guests
that stay paused: nothing here ever loads the emulator.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

from tests.flows.flow import all_free
from xsave.frames import INVALID_M2P_ENTRY
from xsave.guest.xen.machine import DOMID_FREE
from xsave.host import prestart, process, spawn
from xsave.restore import restore as restore_flow


class Forks:
    """Stands in for subprocess.Popen in xsave.host.prestart; knows its children."""

    def __init__(self, monkeypatch):
        self._children = []
        monkeypatch.setattr(
            prestart, "subprocess", SimpleNamespace(Popen=self._popen, DEVNULL=None)
        )

    def _popen(self, command, *, pass_fds, **_):
        pid = os.fork()
        if pid == 0:
            arguments = command[command.index(prestart.PROCESS_MODULE) + 1 :]
            run_child(arguments, pass_fds)
        self._children.append(pid)

    def kill(self):
        """Kill the children that a failed test left behind."""
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._children.clear()

    def all_end(self, seconds=10):
        """Assert that every child ends by itself, without a complaint."""
        deadline = time.monotonic() + seconds
        while self._children:
            while os.waitpid(self._children[0], os.WNOHANG) == (0, 0):
                assert time.monotonic() < deadline, "a domain process does not end"
                time.sleep(0.001)
            self._children.pop(0)


def run_child(arguments, keep):
    """Be a domain process, with no descriptor but those to keep."""
    status = 1
    # What is garbage already may have descriptors: collected here it would close them, whose
    # numbers are ours by then.
    gc.freeze()
    try:
        os.setsid()
        edges = [2, *sorted(keep), os.sysconf("SC_OPEN_MAX")]
        for before, behind in pairwise(edges):
            os.closerange(before + 1, behind)
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
