"""The process behind a post-copy migration's target: it fetches the guest's pages from the source.

It has the connection from the word GO on, which is when the guest begins to run: until then the
command that receives talks there, and nobody may want one of these pages. It says so to the source
(POSTCOPY_BEGIN): that command may have died. What is waited for is asked for at once
(POSTCOPY_FAULT), the rest comes by itself; see image/postwire.py. The source
sends each page once. If the connection ends, or nothing comes for half a minute, before all is
there, the guest is lost: what it has is in no other place.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Iterable

import numpy as np

from xsave.frames import PAGE_SIZE
from xsave.guest.xen.missing import MissingPages
from xsave.guest.xen.outstanding import Outstanding
from xsave.host.filler import Bringer, fork_bringer
from xsave.image import postwire

#: A link that is cut says nothing. Less than who waits with the GIL held is given (filling.py).
SILENCE_TIMEOUT_S = 30.0
_MS_PER_S = 1000
#: Two of the longest records.
_BUFFER_BYTES = 2 * (postwire.HEADER.size + postwire.MAX_BODY)


def fork_fetcher(
    missing: MissingPages,
    outstanding: Outstanding,
    connection: tuple[int, int],
    sock: socket.socket,
    keep: Iterable[int],
) -> int:
    """Start guard and fetcher; return the guard's pid. connection: descriptors, in and out."""
    return fork_bringer(Fetcher(missing, outstanding, connection, sock), keep)


class Fetcher(Bringer):
    """Asks for the outstanding pages and puts them in place. `at` has pfns, plus one."""

    def __init__(
        self,
        missing: MissingPages,
        outstanding: Outstanding,
        connection: tuple[int, int],
        sock: socket.socket,
    ) -> None:
        super().__init__(missing, outstanding, sock)
        self.sources = connection
        self._incoming, self._outgoing = connection
        self._waited_for: set[int] = set()
        self._buffer = np.empty(_BUFFER_BYTES, np.uint8)
        self._filled = 0
        self._over = False

    def run(self) -> None:
        """Wait for GO, then fetch everything. Raises OSError, ValueError."""
        poll = select.poll()
        poll.register(self.missing.fd, select.POLLIN)
        poll.register(self.sock, select.POLLIN)
        self._await_go(poll)
        self._mfns = self._by_pfn()
        self._say(postwire.begin())
        poll.register(self._incoming, select.POLLIN)
        heard = time.monotonic()
        while not self._over:
            left = heard + SILENCE_TIMEOUT_S - time.monotonic()
            ready = [fd for fd, _ in poll.poll(max(left, 0) * _MS_PER_S)]
            if self.sock.fileno() in ready:
                self._heard_go()  # once more? it is gone
            if self.missing.fd in ready:
                self._ask_for(self.missing.faults())
            if self._incoming in ready:
                self._receive()
                heard = time.monotonic()
            elif left <= 0:
                raise _lost(f"nothing has come from the source for {SILENCE_TIMEOUT_S:g} s")
        if self._at[self._outstanding.mfns[: self._outstanding.nr]].any():
            raise _lost("the source has left pages out")
        self.missing.end()

    def _await_go(self, poll: select.poll) -> None:
        while self.sock.fileno() not in [fd for fd, _ in poll.poll()]:
            for mfn in self.missing.faults():
                if position := int(self._at[mfn]):
                    raise _lost(f"pfn {position - 1:#x} was needed before the guest could start")
                self._zero(mfn)
        self._heard_go()

    def _by_pfn(self) -> np.ndarray:
        """Return the frames of what is outstanding by pfn, -1 for what is not: (n,) i64."""
        mfns = self._outstanding.mfns[: self._outstanding.nr].astype(np.int64)
        pfns = self._at[mfns].astype(np.int64) - 1
        found = np.full(int(pfns.max(initial=-1)) + 1, -1, np.int64)
        found[pfns] = mfns
        return found

    def _ask_for(self, mfns: list[int]) -> None:
        wanted = []
        for mfn in mfns:
            if not (position := int(self._at[mfn])):
                self._zero(mfn)
            elif mfn not in self._waited_for:
                self._waited_for.add(mfn)
                wanted.append(position - 1)
        if wanted:
            self._say(postwire.fault(wanted))

    def _say(self, record: bytes) -> None:
        try:
            os.write(self._outgoing, record)
        except OSError as e:
            raise _lost("the source is gone") from e

    def _receive(self) -> None:
        """Read what there is, and take the records that are whole."""
        try:
            got = os.readv(self._incoming, [self._buffer[self._filled :].data])
        except BlockingIOError:
            return
        if not got:
            raise _lost("the source is gone")
        self._filled += got
        data, at = self._buffer.data, 0
        while self._filled - at >= postwire.HEADER.size:
            kind, length = postwire.HEADER.unpack_from(data, at)
            if length > postwire.MAX_BODY:
                raise _lost(f"the source sent a record of {length} bytes")
            start, end = at + postwire.HEADER.size, at + postwire.HEADER.size + length
            if end > self._filled:
                break
            self._take(kind, data[start:end])
            at = end
        self._buffer[: self._filled - at] = self._buffer[at : self._filled].copy()
        self._filled -= at

    def _take(self, kind: int, body: memoryview) -> None:
        if kind == postwire.COMPLETE:
            self._over = True
        elif kind != postwire.PAGE_DATA:
            raise _lost(f"the source sent a record of type {kind:#x}")
        else:
            try:
                self._place(postwire.pages_of(body))
            except ValueError as e:
                raise _lost(f"the source sent nonsense: {e}") from e

    def _place(self, found: postwire.Pages) -> None:
        row, address = 0, found.pages.ctypes.data
        for pfn, is_empty in zip(found.pfns.tolist(), found.is_empty.tolist(), strict=True):
            mfn = int(self._mfns[pfn]) if pfn < self._mfns.size else -1
            if mfn < 0:
                raise ValueError(f"pfn {pfn:#x} was not to come")
            if self._at[mfn]:
                if not is_empty:
                    self._put(mfn, address + row * PAGE_SIZE)
                elif mfn in self._waited_for:
                    self._zero(mfn)  # else it stays a hole
                self._at[mfn] = 0
            row += not is_empty


def _lost(why: str) -> OSError:
    return OSError(errno.EIO, why)
