"""The log of dirty frames in the domain's process, and the brake on a guest that dirties too fast.

One connection has the log at a time; when that is closed, the log and the brake are off and the
guest goes on as before. The writes of other processes, through mappings of their own, are not
seen here: who writes to a running domain's frames says so (`mark`), as Xen marks what dom0 writes
through a foreign mapping.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xsave.distinct import distinct
from xsave.errors import GuestStateError, StorageError, UsageError
from xsave.guest.xen.logdirty import COMPARE, KINDS, USERFAULTFD
from xsave.guest.xen.writtenframes import WrittenFrames
from xsave.host.control import Client, Request
from xsave.host.running import RunningDomain
from xsave.host.throttle import MAX_PERCENT

Answer = tuple[dict[str, Any], bytes]
AUTO = "auto"


class Dirtying:
    """Whose log it is, and what it saw."""

    def __init__(self, running: RunningDomain) -> None:
        self._running = running
        self._holder: Client | None = None
        self._written: WrittenFrames | None = None

    def op_logdirty(self, request: Request) -> Answer:
        """XEN_DOMCTL_SHADOW_OP_{ENABLE_LOGDIRTY,PEEK,CLEAN,OFF}, and `mark` with mfns."""
        action = request.arguments["action"]
        if action == "enable":
            return {"kind": self._enable(request)}, b""
        if action == "mark":
            self._mark(np.frombuffer(request.blob, np.uint64))
            return {}, b""
        if request.client is not self._holder:
            raise GuestStateError("the log of dirty frames is off, or another's")
        if action == "disable":
            self.off()
            return {}, b""
        if action not in ("peek", "clean"):
            raise UsageError(f"unknown action {action!r}")
        return {}, self._dirty(clear=action == "clean").astype(np.uint32).tobytes()

    def _enable(self, request: Request) -> str:
        wanted = request.arguments.get("kind", AUTO)
        if wanted not in (AUTO, *KINDS):
            raise UsageError(f"a log of dirty frames of kind {wanted!r}: there is no such")
        if self._holder is not None:
            raise GuestStateError("another migration of this domain is at work")
        machine = self._running.machine
        if wanted != COMPARE:
            try:
                self._written = WrittenFrames(machine, self._running.domid)
            except StorageError:
                if wanted == USERFAULTFD:
                    raise
        self._holder = request.client
        machine.marked = set()
        return COMPARE if self._written is None else USERFAULTFD

    def _mark(self, mfns: np.ndarray) -> None:
        machine = self._running.machine
        machine.mark(mfns[mfns < machine.nr_frames])

    def _dirty(self, *, clear: bool) -> np.ndarray:
        """Return the frames that are dirty, (n,) i64; of a comparing log those that it does not
        find by itself."""
        machine = self._running.machine
        marked = np.fromiter(machine.marked or (), np.int64)
        if clear:
            machine.marked = set()
        if self._written is None:
            return distinct((marked,))
        return distinct((marked, self._written.written(marked, clear=clear)))

    def op_throttle(self, request: Request) -> Answer:
        """How much of the time the vCPUs are to rest, in percent."""
        percent = int(request.arguments["percent"])
        if not 0 <= percent <= MAX_PERCENT:
            raise UsageError(f"{percent} percent: expected 0 to {MAX_PERCENT}")
        if request.client is not self._holder:
            raise GuestStateError("only a migration may throttle a guest")
        self._running.throttle.percent = percent
        return {}, b""

    def off(self) -> None:
        """No log, no brake."""
        if self._written is not None:
            self._written.close()
        self._holder, self._written, self._running.machine.marked = None, None, None
        self._running.throttle.percent = 0

    def closed(self, client: Client) -> None:
        """A connection ended."""
        if client is self._holder:
            self.off()
