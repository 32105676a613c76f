"""The command that starts a domain's process is killed, at each step of it: nothing is left, and
at once, not when the process is tired of waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.flows.flow import create, destroy, nothing_is_left, processes, wait_for
from xsave.errors import GuestStateError, HostCannotTake
from xsave.host import operations
from xsave.host.spawn import spawn

#: Sends itself a signal before or behind one call of what spawn() does with sockets.
KILLED = """
import os, signal, socket, sys
from xsave.host import host, spawn

step, when, number = sys.argv[1:]

class Socket(socket.socket):
    pass

def deadly(real):
    def call(*arguments):
        if when == "behind":
            result = real(*arguments)
        os.kill(os.getpid(), int(number))
        return result if when == "behind" else real(*arguments)
    return call

if step == "send_fds":
    socket.send_fds = deadly(socket.send_fds)
else:
    setattr(Socket, step, deadly(getattr(socket.socket, step)))
    socket.socket = Socket
localhost = host.open_host("localhost")
process = spawn.WaitingProcess(localhost.directory)
spawn.spawn(localhost, "g", process)
print("not killed")
"""


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("step", ["bind", "listen", "connect", "send_fds"])
def test_killed_at_each_step(localhost, step, when):
    """The process and its registration are gone long before its patience is."""
    began = time.monotonic()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, step, when, str(int(signal.SIGKILL))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    wait_for(lambda: not processes(localhost))
    assert time.monotonic() - began < operations._BUILDER_TIMEOUT_S / 2
    nothing_is_left(localhost)
    create(localhost)
    destroy(localhost)
    nothing_is_left(localhost)


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("step", ["bind", "listen", "connect", "send_fds"])
def test_interrupted_at_each_step(localhost, step, when):
    """Ctrl-C: all of it is gone when the command is, however long the process takes to load."""
    interrupted = subprocess.run(
        [sys.executable, "-c", KILLED, step, when, str(int(signal.SIGINT))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert interrupted.stdout == ""
    assert interrupted.stderr.endswith("KeyboardInterrupt\n")
    assert localhost.records() == []
    nothing_is_left(localhost)


def mapped(host, mfns):
    """Return which of these frames the host's only domain's process has in its page table."""
    (pid,) = processes(host)
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    (start,) = [line.split("-")[0] for line in maps if line.endswith("machine.mem")]
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    found = [os.pread(fd, 8, 8 * ((int(start, 16) >> 12) + mfn))[7] >> 7 == 1 for mfn in mfns]
    os.close(fd)
    return found


def test_touched_ahead(localhost):
    """The process has the frames at hand that it was to touch, if they are its domain's; no frame
    that holds nothing is made to take room."""
    with spawn(localhost, "g") as domctl:
        domctl.begin(nr_vcpus=1, max_pages=256)
        domctl.wait_begun()
        machine = domctl.machine
        mine = np.sort(domctl.populate(128))
        foreign = machine.allocate(99, 8)
        written = np.array([mine[5], mine[100], foreign[0]])
        pages = np.ones((3, 4096), np.uint8)
        machine.write_frames(written, pages, np.arange(3))
        asked = np.array([*written.tolist(), machine.nr_frames, (1 << 64) - 1], np.uint64)
        assert mapped(localhost, written.tolist()) == [False] * 3
        domctl.touch(asked)
        assert mapped(localhost, written.tolist()) == [True, True, False]
        assert machine.resident(mine).sum() == 2
        machine.free(foreign)


def test_what_failed_is_not_committed(localhost):
    """Who makes a domain may ask for all of it at once: of a part that fails it hears twice, and
    nothing is left when it goes."""
    with spawn(localhost, "g") as domctl:
        domctl.begin(nr_vcpus=1, max_pages=256)
        rings = domctl.ask_connect_rings(1 << 40, 1 << 40)
        committed = domctl.ask_commit()
        with pytest.raises(HostCannotTake, match="xenstore ring lies outside"):
            rings()
        with pytest.raises(GuestStateError, match="not whole: the xenstore ring"):
            committed()
        with pytest.raises(GuestStateError, match="not complete"):
            domctl.unpause()
    wait_for(lambda: not processes(localhost))
    nothing_is_left(localhost)
