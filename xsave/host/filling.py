"""A domain whose memory is still coming, as its process sees it: lazy restore, post-copy.

    start -> (faults are served) -> go -> done
                                     '--> lost: the guest is stopped where it is, for good

The pages are brought by another process, from an image (filler.py) or from the source of a
migration (fetcher.py); here are what depends on them and what is to be done if it fails. It may
fail at any moment: the image is read as the pages are needed, the source may die. The
guest can then neither go on nor be saved. Its hypercalls are cut off first and only then is
let go who waits for a page; what it finds there is zeros, and it does nothing with them any more.

A thread that waits with the GIL held is in the way of all this; the guard of filler.py sees to it.
Where that has been killed too this process ends after a minute, by a watchdog that needs no GIL.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from xsave.errors import HostCannotTake, UsageError
from xsave.frames import PAGE_SHIFT
from xsave.guest.xen import missing
from xsave.guest.xen.machine import Machine
from xsave.guest.xen.missing import MissingPages
from xsave.guest.xen.outstanding import Outstanding
from xsave.host.fetcher import fork_fetcher
from xsave.host.filler import GO, fork_filler

#: How long a thread may wait with the GIL held while nobody brings pages.
_WATCHDOG_S = 60.0
_REARM_S = 5.0
#: How long a page that was just put in place may take to be crossed off.
_GLANCE_S = 0.001
#: So many descriptors.
_FROM_IMAGE, _FROM_SOURCE = 2, 3
#: Reads a byte without the GIL.
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def require_faults(machine: Machine) -> None:
    """Raise HostCannotTake where pages cannot be brought as they are touched."""
    try:
        missing.check(machine.pages.ctypes.data, machine.nr_frames)
    except OSError as e:
        raise HostCannotTake(
            f"this host cannot take post-copy: userfaultfd: {e.strerror} ({_reason(e)})"
        ) from e


def _reason(error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return "the machine's memory is not on tmpfs, or the kernel is too old"
    return (
        "forbidden by vm.unprivileged_userfaultfd or by a container's rules, or not in the kernel"
    )


class Filling:
    """The pages to come of one domain.

    alive: the descriptor of the domain's `alive` file; lazy: where it is restored lazily, those of
    the image and of the Outstanding tables; with post-copy those of the connection to the source,
    in and out, and of the tables. on_end() is called, by another thread, when no page
    comes any more; before that cut_off(), if not all have come: nobody who waits goes on yet.
    """

    def __init__(
        self,
        machine: Machine,
        alive: int,
        lazy: Sequence[int],
        on_end: Callable[[], None],
        cut_off: Callable[[], None],
    ) -> None:
        self._machine = machine
        self._alive, self._lazy = alive, lazy
        self._on_end, self._cut_off = on_end, cut_off
        self._missing: MissingPages | None = None
        self._outstanding: Outstanding | None = None
        self._sock: socket.socket | None = None
        self._pid = 0
        self._pidfd = -1
        self._watcher: threading.Thread | None = None
        self._stopping = False
        #: They come from the source of a migration, from the moment on at which it has let go.
        self.from_source = len(lazy) == _FROM_SOURCE
        self.started = False
        #: Pages are still to come.
        self.active = False
        #: Why the rest will never come, "" as long as it may.
        self.lost = ""

    def start(self) -> None:
        """From here on what is missing is brought when it is touched. Raises HostCannotTake where
        the kernel does not let us; UsageError if the domain was not given what it takes."""
        if len(self._lazy) not in (_FROM_IMAGE, _FROM_SOURCE) or self.active:
            raise UsageError("this domain is not restored lazily")
        *sources, tables = self._lazy
        machine = self._machine
        self._outstanding = Outstanding(tables)
        try:
            self._missing = MissingPages(machine.pages.ctypes.data, machine.nr_frames)
        except OSError as e:
            raise HostCannotTake(
                f"this host cannot restore lazily: userfaultfd: {e.strerror} ({_reason(e)})"
            ) from e
        self._sock, theirs = socket.socketpair()
        keep = [self._alive]
        with theirs:
            if self.from_source:
                connection = (sources[0], sources[1])
                self._pid = fork_fetcher(self._missing, self._outstanding, connection, theirs, keep)
            else:
                self._pid = fork_filler(self._missing, self._outstanding, sources[0], theirs, keep)
        self._pidfd = os.pidfd_open(self._pid)
        self._forget_lazy()
        self.active = self.started = True
        self._watcher = threading.Thread(target=self._watch, name="filling", daemon=True)
        self._watcher.start()

    def go(self) -> None:
        """Bring the rest, too, whether it is asked for or not."""
        if self.active and self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.sendall(GO)

    def have(self, buffers: Iterable[memoryview]) -> bool:
        """Wait for the pages that these buffers lie in, one each: what is handed to the kernel must
        be there. False if the bytes are not the guest's: they never came. For any thread."""
        if not self.active:
            return not self.lost
        return all(self._wait_for(self._page_of(buffer)) for buffer in buffers)

    def settle(self, mfns: np.ndarray) -> None:
        """Have these frames, which are to be freed: nothing may be put there any more."""
        if self.active and self._outstanding is not None:
            for mfn in mfns[self._outstanding.at[mfns] != 0].tolist():
                self._wait_for(mfn)

    def _page_of(self, buffer: memoryview) -> int:
        address = np.frombuffer(buffer, np.uint8).ctypes.data
        return (address - self._machine.pages.ctypes.data) >> PAGE_SHIFT

    def _wait_for(self, mfn: int) -> bool:
        """Touch a page without the GIL. It has come if it has been crossed off: not if there is a
        page only because nobody brings it any more."""
        address = self._machine.pages.ctypes.data + (mfn << PAGE_SHIFT)
        byte = ctypes.create_string_buffer(1)
        while not (self.lost or self._stopping):
            _memcmp(address, ctypes.addressof(byte), 1)
            outstanding = self._outstanding
            if outstanding is None or not outstanding.at[mfn]:
                return not self.lost
            time.sleep(_GLANCE_S)
        return False

    def stop(self) -> None:
        """Bring nothing any more; when this returns nothing touches the machine's memory. Nobody
        waits for a page."""
        self._stopping = True
        if self._watcher is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._watcher.join()
            os.close(self._pidfd)
            self._watcher = None
        self._forget_lazy()

    def _forget_lazy(self) -> None:
        for descriptor in self._lazy:
            os.close(descriptor)
        self._lazy = ()

    # -- the thread that waits for the other process ---

    def _watch(self) -> None:
        assert self._missing is not None and self._sock is not None
        message = self._hear(self._sock)
        if "done" not in message and not self._stopping:
            self.lost = message.get("error", "the process that brings its pages has ended")
            self._cut_off()
        with contextlib.suppress(OSError):
            self._missing.end()
        self._missing.close()
        self._sock.close()
        os.waitpid(self._pid, 0)
        self.active = False
        self._outstanding = None
        if not self._stopping:
            self._on_end()

    def _hear(self, sock: socket.socket) -> dict[str, str]:
        """Return the other process's last words, {} if it had none."""
        while True:
            faulthandler.dump_traceback_later(_WATCHDOG_S, exit=True)
            if select.select([sock], [], [], _REARM_S)[0]:
                break
        faulthandler.cancel_dump_traceback_later()
        line = b""
        with contextlib.suppress(OSError):
            while not line.endswith(b"\n") and (piece := sock.recv(4096)):
                line += piece
        try:
            message = json.loads(line)
        except ValueError:
            return {}
        return message if isinstance(message, dict) else {}
