"""The processes behind a lazy restore: one brings a domain's pages, one stands guard over it.

    domain's process --fork--> guard --fork--> filler

Forked, as what they need is loaded in the domain's process, and processes of their own they must
be: a thread of the domain that waits for a page may hold the GIL. The filler serves faults from
the first moment; in the background it fills in only from the word GO on, so that the CPU is the
guest's while that starts. What is said on the socket is JSON, one line: `done`, or `error`. Each
dies with its parent.

A page is put where it belongs through the userfaultfd, never by writing to the machine's file: so
one that is there already is left alone, and nothing can be written once the domain is gone.

The guard is for the worst. If the filler fails or is killed, the domain's process ends the guest
and closes the socket. A thread that waits for a page with the GIL held is in the way of that: so
when nothing happens the guard lets those go who wait at that moment, with zeros. `at` of these
pages is not cleared: they have not come.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from xsave.frames import PAGE_SIZE
from xsave.guest.xen.missing import MissingPages
from xsave.guest.xen.outstanding import Outstanding

GO = b"g"
#: Pages read from the image together.
_BATCH = 256
#: Pages that are put in place before faults are looked at again.
_PATIENCE = 8
#: How long the domain's process has to end the guest before who waits in it is let go.
_LET_GO_AFTER_MS = 500
#: How long threads that were woken may take to fault again.
_TELL_AGAIN_S = 0.01
_PR_SET_PDEATHSIG = 1
#: Exit codes of the filler.
_ALL_WELL, _FAILED, _HAS_TOLD = 0, 1, 3


class Stopped(Exception):
    """The domain's process has gone."""


def fork_filler(
    missing: MissingPages,
    outstanding: Outstanding,
    image: int,
    sock: socket.socket,
    keep: Iterable[int],
) -> int:
    """Start guard and filler; return the guard's pid. keep: descriptors they are to have without
    using them."""
    return fork_bringer(Filler(missing, outstanding, image, sock), keep)


def fork_bringer(bringer: Bringer, keep: Iterable[int]) -> int:
    """Start a guard, and behind it the process that runs `bringer`; return the guard's pid."""
    missing, sock = bringer.missing, bringer.sock

    def guard() -> int:
        _close_all_but({2, missing.fd, sock.fileno(), *bringer.sources, *keep})
        pid = _fork(lambda: _fill(bringer, sock))
        for source in set(bringer.sources):  # whoever is at its other end is to see that one die
            os.close(source)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != _ALL_WELL:
            if status != _HAS_TOLD:
                _tell(sock, {"error": "the process that brings its pages has ended"})
            _let_go(missing, sock)
        return 0

    return _fork(guard)


def _fork(run: Callable[[], int]) -> int:
    """Fork; return the pid. The child runs and exits with what it returned."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = _FAILED
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            code = run()
    except BaseException:  # noqa: BLE001 - into the domain's log, and no further: this is no xsave
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _close_all_but(kept: set[int]) -> None:
    """A socket that is open here, too, would never be seen to be closed at its other end."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(entry.name))


def _tell(sock: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(json.dumps(message).encode() + b"\n")


def _fill(bringer: Bringer, sock: socket.socket) -> int:
    try:
        bringer.run()
    except Stopped:
        return _ALL_WELL
    except OSError as e:
        _tell(sock, {"error": e.strerror or str(e)})
        return _HAS_TOLD
    _tell(sock, {"done": True})
    return _ALL_WELL


def _let_go(missing: MissingPages, sock: socket.socket) -> None:
    """Until the socket is closed, let go now and then who waits for a page."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    with contextlib.suppress(OSError):  # the domain is gone
        while not poll.poll(_LET_GO_AFTER_MS):
            missing.wake()  # what the filler was told of is told again
            time.sleep(_TELL_AGAIN_S)
            for page in missing.faults():
                missing.zero(page)


class Bringer:
    """Puts pages in place that are waited for, or not yet. sources: the descriptors that it has
    them from; sock: the domain's process, which says GO."""

    sources: tuple[int, ...] = ()

    def __init__(
        self, missing: MissingPages, outstanding: Outstanding, sock: socket.socket
    ) -> None:
        self.missing = missing
        self.sock = sock
        self._outstanding = outstanding
        self._at = outstanding.at

    def run(self) -> None:
        """Bring all that is outstanding, and end. Raises OSError: it cannot be had."""
        raise NotImplementedError

    def _heard_go(self) -> None:
        """Something has come from the domain's process. Raises Stopped."""
        if self.sock.recv(1) != GO:
            raise Stopped

    def _put(self, mfn: int, address: int) -> None:
        self._call(self.missing.copy, mfn, address)

    def _zero(self, mfn: int) -> None:
        self._call(self.missing.zero, mfn)

    def _call(self, put: Callable[..., bool], *arguments: int) -> None:
        try:
            put(*arguments)
        except OSError as e:
            if e.errno in (errno.ESRCH, errno.ENOENT):  # it ends
                raise Stopped from e
            raise


class Filler(Bringer):
    """Brings the pages of an image in a file."""

    def __init__(
        self, missing: MissingPages, outstanding: Outstanding, image: int, sock: socket.socket
    ) -> None:
        super().__init__(missing, outstanding, sock)
        self._image = image
        self.sources = (image,)
        self._pages = np.empty((_BATCH, PAGE_SIZE), np.uint8)
        self._one = np.empty((1, PAGE_SIZE), np.uint8)

    def run(self) -> None:
        """Serve faults until GO, then bring everything, and end. Raises OSError: the image cannot
        be read, or is shorter than it was."""
        poll = select.poll()
        poll.register(self.missing.fd, select.POLLIN)
        poll.register(self.sock, select.POLLIN)
        while not any(fd == self.sock.fileno() for fd, _ in poll.poll()):
            self._serve_faults()
        self._heard_go()
        for first in range(0, self._outstanding.nr, _BATCH):
            self._bring(self._outstanding.mfns[first : first + _BATCH])
        self.missing.end()

    def _serve_faults(self) -> None:
        for mfn in self.missing.faults():
            if position := int(self._at[mfn]):
                self._read(self._one, position - 1)
                self._put(mfn, self._one.ctypes.data)
                self._at[mfn] = 0
            else:
                self._zero(mfn)

    def _bring(self, mfns: np.ndarray) -> None:
        """Put those of the pages in place that have not come yet."""
        mfns = mfns[self._at[mfns] != 0]
        positions = self._at[mfns].astype(np.int64) - 1
        cuts = np.flatnonzero(np.diff(positions) != PAGE_SIZE) + 1
        for start, end in pairwise([0, *cuts.tolist(), mfns.size]):
            if start < end:
                self._read(self._pages[start:end], int(positions[start]))
        holds = (self._pages[: mfns.size].view(np.uint64) != 0).any(axis=1)
        address = self._pages.ctypes.data
        for i, mfn in enumerate(mfns.tolist()):
            if i % _PATIENCE == 0:
                self._serve_faults()
            if holds[i]:  # else it stays a hole, as it was in the image of a guest's memory
                self._put(mfn, address + i * PAGE_SIZE)
        self._at[mfns] = 0

    def _read(self, pages: np.ndarray, position: int) -> None:
        left = memoryview(pages.reshape(-1).data)
        while left:
            got = os.preadv(self._image, [left], position)
            if not got:
                raise OSError(errno.EIO, "the image was cut shorter while it was read")
            left, position = left[got:], position + got
