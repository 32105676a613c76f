"""Pages fetched over a connection: the ones waited for are asked for, all are put in place, and
what goes wrong is told."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import threading

import numpy as np
import pytest

from tests.host.test_filler import last_words
from xsave.guest.xen.machine import Machine, create_files
from xsave.guest.xen.missing import MissingPages
from xsave.guest.xen.outstanding import Outstanding
from xsave.host import fetcher
from xsave.host.fetcher import fork_fetcher
from xsave.host.filler import GO
from xsave.image import postwire

NR_FRAMES = 4096
MFNS = np.random.default_rng(5).permutation(np.arange(2048, 2048 + 300))
PFNS = 7 * np.arange(MFNS.size)
PAGES = np.random.default_rng(6).integers(0, 1 << 60, (MFNS.size, 512), np.uint64)
PAGES[::4] = 0


class Rig:
    """A fetcher's three neighbours: the machine, the domain's process (sock), the source."""

    def __init__(self, directory):
        create_files(directory, NR_FRAMES, 1)
        self.machine = Machine(directory, "test")
        self._threads = []
        fd = Outstanding.create(NR_FRAMES)
        self.outstanding = Outstanding(fd)
        self.outstanding.put(MFNS, PFNS.astype(np.uint64))
        self._missing = MissingPages(self.machine.pages.ctypes.data, NR_FRAMES)
        self.sock, theirs = socket.socketpair()
        self.source, far = socket.socketpair()
        with theirs, far:
            connection = (far.fileno(), far.fileno())
            self.pid = fork_fetcher(self._missing, self.outstanding, connection, theirs, [])
        os.close(fd)

    def close(self):
        self.sock.close()
        self.source.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._missing.close()
        for thread in self._threads:  # they look at the machine
            thread.join(10)

    def touch(self, mfn):
        """Touch a frame in a thread that does not hold the GIL meanwhile; return its event."""
        touched = threading.Event()
        address = self.machine.pages[mfn : mfn + 1].ctypes.data

        def touch():
            ctypes.CDLL(None).memcmp(ctypes.c_void_p(address), ctypes.create_string_buffer(1), 1)
            touched.set()

        thread = threading.Thread(target=touch, daemon=True)
        thread.start()
        self._threads.append(thread)
        return touched

    def go(self):
        """Say that the guest runs; the source hears of it."""
        self.sock.sendall(GO)
        assert select.select([self.source], [], [], 10)[0]
        assert self.source.recv(8) == postwire.begin()

    def asked(self):
        """Return the pfns of the next POSTCOPY_FAULT."""
        assert select.select([self.source], [], [], 10)[0]
        data = self.source.recv(4096)
        assert postwire.HEADER.unpack_from(data)[0] == postwire.FAULT
        return postwire.faulted(data[postwire.HEADER.size :]).tolist()

    def send(self, rows):
        for buffer in postwire.page_data(PFNS[rows], PAGES[rows]):
            self.source.sendall(buffer)


@pytest.fixture
def rig(xsave_home):
    rig = Rig(xsave_home)
    yield rig
    rig.close()


def test_what_is_waited_for_is_asked_for(rig):
    """Once, whoever waits; it is there as soon as it has come, and so is the rest at the end."""
    rig.go()
    touched = rig.touch(int(MFNS[101]))
    assert rig.asked() == [PFNS[101]]
    again = rig.touch(int(MFNS[101]))
    assert not touched.wait(0.1)
    rig.send(np.array([101]))
    assert touched.wait(10)
    assert again.wait(10)
    empty = rig.touch(int(MFNS[40]))
    assert rig.asked() == [PFNS[40]]
    rig.send(np.array([40]))
    assert empty.wait(10)
    assert not select.select([rig.source], [], [], 0.1)[0]
    rest = np.delete(np.arange(MFNS.size), [40, 101])
    for first in range(0, rest.size, 64):
        rig.send(rest[first : first + 64])
    rig.source.sendall(postwire.complete())
    assert last_words(rig.sock) == {"done": True}
    assert (rig.machine.mem[MFNS] == PAGES).all()
    assert not rig.outstanding.at.any()


def test_nobody_asks_before_the_guest_is_here(rig):
    """A page that is touched before GO was to come with the image: that is said, not waited for."""
    rig.touch(int(MFNS[101]))
    assert "0x2c3 was needed before" in last_words(rig.sock)["error"]


def nonsense(kind, body):
    return postwire.HEADER.pack(kind, len(body)) + body


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (postwire.complete(), "left pages out"),
        (nonsense(postwire.PFNS, b""), "a record of type"),
        (postwire.HEADER.pack(postwire.PAGE_DATA, 1 << 30), "a record of 1073741824 bytes"),
        (nonsense(postwire.PAGE_DATA, bytes(8)), "nonsense"),
        (b"".join(bytes(b) for b in postwire.page_data(PFNS[:1] + 1, PAGES[1:2])), "was not to"),
        (b"".join(bytes(b) for b in postwire.page_data(PFNS[:1], PAGES[1:2]))[:-9], "is gone"),
        (b"", "is gone"),
    ],
)
def test_what_the_source_may_not_say(rig, data, why):
    """It ends with a reason; nobody who waits is let go before that was heard."""
    rig.go()
    touched = rig.touch(int(MFNS[200]))
    rig.asked()
    rig.source.sendall(data)
    rig.source.shutdown(socket.SHUT_WR)
    assert why in last_words(rig.sock)["error"]
    assert rig.outstanding.at[MFNS[200]]
    assert not touched.is_set()


def test_a_silent_source(xsave_home, monkeypatch):
    """A link that is cut says nothing."""
    monkeypatch.setattr(fetcher, "SILENCE_TIMEOUT_S", 0.3)
    rig = Rig(xsave_home)
    rig.go()
    assert "nothing has come" in last_words(rig.sock)["error"]
    rig.close()
