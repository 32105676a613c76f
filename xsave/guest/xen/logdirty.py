"""Which frames of a running domain were written, as the toolstack learns it (XEN_DOMCTL_SHADOW_OP).

Two implementations behind one door, Domctl.log_dirty():

    userfaultfd   the domain's process write-protects its own mapping (writtenframes.py) and
                  answers which frames lost the protection. A round's pages are read from their
                  frames: whatever is written after clean() is dirty again.
    compare       for kernels without that. Here every frame is compared with the copy that was
                  sent last, and what differs is copied. A round's pages are read from the copies,
                  never from the frames, so that what is compared next is what was sent.

Never the guest's own D bits: those are the guest's, and miss the hypervisor's writes. What is
named are frames, (n,) i64, ascending: which pfn a frame is the guest changes meanwhile, and who
asks must look again (a frame that is another's by then may be among them, too). As in Xen a frame
is dirty as well if nobody wrote to it, but it has got another owner, pfn or page type; so all that
a toolstack sees of the guest is what it was, but for the frames that are named.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Protocol

import numpy as np

from xsave.distinct import distinct
from xsave.guest.xen.machine import Machine

USERFAULTFD, COMPARE = "userfaultfd", "compare"
KINDS = (USERFAULTFD, COMPARE)
_BATCH = 1024
Ask = Callable[[str], Callable[[], bytes]]


class LogDirty(Protocol):
    """A log that is on. `pages` (nr_frames, 512) u64: where the frames that the last clean()
    returned are to be read from."""

    kind: str
    pages: np.ndarray
    #: To peek takes much less time than to send what is found.
    peeks: bool

    def touched(self, mfns: np.ndarray) -> np.ndarray:
        """Return (n,) bool: False for those whose rows of `pages` hold zeros."""

    def peek(self) -> np.ndarray:
        """Return the frames that are dirty since the last clean(), (n,) i64."""

    def clean(self) -> np.ndarray:
        """The same, and begin anew. The first one is due before anything is sent."""

    def ask_last(self) -> Callable[[], np.ndarray]:
        """clean() of a guest that does not run, for the last time: what is returned waits for
        the frames."""

    def off(self) -> None:
        """End it; nothing is logged any more."""


class WrittenLog:
    """The domain's process logs; ask(action) is the request to it, and returns what waits for
    the frames, as u32."""

    kind = USERFAULTFD
    peeks = True

    def __init__(self, machine: Machine, ask: Ask) -> None:
        self.pages = machine.mem
        self.touched = machine.resident
        self._ask = ask

    def peek(self) -> np.ndarray:
        return _frames(self._ask("peek")())

    def clean(self) -> np.ndarray:
        return _frames(self._ask("clean")())

    def ask_last(self) -> Callable[[], np.ndarray]:
        answer = self._ask("peek")  # nothing comes after that: none has to be protected again
        return lambda: _frames(answer())

    def off(self) -> None:
        self._ask("disable")()


class CompareLog:
    """Copies of all that was sent, as large as the domain's memory that holds anything.

    ask is as for WrittenLog: the domain's process only knows what was not written and is dirty
    all the same.
    """

    kind = COMPARE
    peeks = False

    def __init__(self, machine: Machine, domid: int, ask: Ask) -> None:
        self._machine = machine
        self._domid = domid
        self._ask = ask
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._map = mmap.mmap(-1, len(machine.map), flags=flags)
        self.pages = np.frombuffer(self._map, np.uint64).reshape(-1, 512)
        self._copied = np.zeros(machine.nr_frames, bool)

    def touched(self, mfns: np.ndarray) -> np.ndarray:
        return np.asarray(self._copied[mfns])

    def peek(self) -> np.ndarray:
        return self._compare(copy=False)

    def clean(self) -> np.ndarray:
        return self._compare(copy=True)

    def ask_last(self) -> Callable[[], np.ndarray]:
        return self.clean

    def _compare(self, *, copy: bool) -> np.ndarray:
        machine, marked = self._machine, _frames(self._ask("clean" if copy else "peek")())
        mfns = np.flatnonzero(machine.owner == self._domid)
        # A hole is zero, as is what was never copied: reading it would only allocate it.
        mfns = mfns[machine.resident(mfns) | self._copied[mfns]]
        written = [marked]
        for first in range(0, mfns.size, _BATCH):
            some = mfns[first : first + _BATCH]
            now = machine.mem[some]
            differ = (now != self.pages[some]).any(axis=1)
            changed = some[differ]
            written.append(changed)
            if copy and changed.size:
                self.pages[changed] = now[differ]
                self._copied[changed] = True
        return distinct(written)

    def off(self) -> None:
        self._ask("disable")()
        self.pages = self.pages[:0]


def _frames(answer: bytes) -> np.ndarray:
    return np.frombuffer(answer, np.uint32).astype(np.int64)
