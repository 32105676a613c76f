"""A blkfront made by hand: a guest with a grant table, a ring page and some data pages.

Page i of a Guest is granted by entry 8 + i. The ring is page RING; the store is written as the
guest's kernel would write it.
"""

from __future__ import annotations

import struct

from xsave.guest.xen.blkback.device import BlockDevice
from xsave.guest.xen.blkback.disk import Vbd
from xsave.guest.xen.events import Port

RING = 5
FIRST_REF = 8
READ, WRITE, BARRIER, FLUSH, DISCARD, INDIRECT = 0, 1, 2, 3, 5, 6
OKAY, ERROR, UNSUPPORTED = 0, -1, -2
READONLY = 4
INITIALISING, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED = range(1, 7)
XVDA = 51712


class MemoryDisk:
    """A disk that is a bytearray; `broken` makes every request fail."""

    def __init__(self, nr_sectors=64, *, readonly=False):
        self.data = bytearray(512 * nr_sectors)
        self.readonly = readonly
        self.nr_sectors = nr_sectors
        self.broken = False
        self.nr_flushes = 0
        self.nr_asked = 0

    def _check(self):
        self.nr_asked += 1
        if self.broken:
            raise OSError(5, "broken")

    def read(self, offset, buffers):
        self._check()
        for view in buffers:
            view[:] = self.data[offset : offset + len(view)]
            offset += len(view)

    def write(self, offset, buffers):
        self._check()
        for view in buffers:
            self.data[offset : offset + len(view)] = view
            offset += len(view)

    def flush(self):
        self._check()
        self.nr_flushes += 1


class Frontend:
    """`waiting` holds the jobs that are not done yet, if `slow`."""

    def __init__(self, guest, disk=None, *, slow=False):
        self.guest = guest
        self.domain = guest.domain
        self.disk = disk or MemoryDisk()
        self.slow = slow
        self.waiting = []
        self.nr_forgotten = 0
        vbd = Vbd(XVDA, "xvda", "raw:/disk", self.disk.readonly, cdrom=False)
        self.device = BlockDevice(self.domain, vbd, self.disk, self._submit, self._forget)
        self.device.plug()
        assert self.domain.grants.setup(1) == 0
        for page in range(guest.nr):
            self.grant(page)
        self.produced = 0

    def _submit(self, job):
        self.waiting.append(job)
        if not self.slow:
            self.finish()

    def finish(self):
        """Do the jobs that wait."""
        while self.waiting:
            job = self.waiting.pop(0)
            job.run(self.disk)
            self.device.complete(job)

    def _forget(self):
        self.nr_forgotten += 1

    # -- the guest's side ---

    def entry(self, ref):
        """(flags, domid, frame) of a grant entry."""
        at = (self.domain.grants.frames[0] << 12) + 8 * ref
        return struct.unpack_from("<HHI", self.guest.machine.map, at)

    def set_entry(self, ref, flags, domid, frame):
        at = (self.domain.grants.frames[0] << 12) + 8 * ref
        struct.pack_into("<HHI", self.guest.machine.map, at, flags, domid, frame)

    def grant(self, page, flags=1):
        self.set_entry(FIRST_REF + page, flags, 0, self.guest.frames[page])

    def write(self, node, value):
        self.domain.store.write(f"{self.domain.home}/device/vbd/{XVDA}/{node}", str(value))

    def backend(self, node):
        path = f"/local/domain/0/backend/vbd/{self.domain.domid}/{XVDA}/{node}"
        return (self.domain.store.read(path) or b"").decode()

    @property
    def backend_state(self):
        return int(self.backend("state"))

    def connect(self, *, persistent=0, **nodes):
        """Offer the ring, and say Initialised; nodes replace what would be written."""
        self.port = self.domain.events.bind(Port("unbound"))
        self.guest.poke(RING, 0, struct.pack("<4I", 0, 1, 0, 1))
        self.produced = 0
        offer = {
            "ring_ref": FIRST_REF + RING, "event_channel": self.port,
            "protocol": "x86_64-abi", "feature_persistent": persistent, **nodes,
        }  # fmt: skip
        for node, value in offer.items():
            self.write(node.replace("_", "-") if node != "protocol" else node, value)
        self.write("state", INITIALISED)
        return self.backend_state

    def put(self, op, sector, *segments, nr=None):
        """Put a request of (ref, first, last) segments into the ring; its id is its number."""
        nr = len(segments) if nr is None else nr
        raw = struct.pack("<BBHxxxxQQ", op, nr, 0, self.produced, sector)
        raw += b"".join(struct.pack("<IBBxx", *segment) for segment in segments)
        self.guest.poke(RING, 64 + self.produced % 32 * 112, raw)
        self.produced += 1
        self.guest.poke(RING, 0, struct.pack("<I", self.produced & 0xFFFFFFFF))

    def notify(self):
        assert self.domain.events.send(self.port) == 0

    def ask(self, op, sector, *segments, **more):
        """One request; return its status."""
        self.put(op, sector, *segments, **more)
        self.notify()
        answered, op_answered, status = self.response(self.produced - 1)
        assert (answered, op_answered) == (self.produced - 1, op)
        return status

    def responded(self):
        return struct.unpack("<I", self.guest.peek(RING, 8, 4))[0]

    def response(self, number):
        """(id, operation, status) of a response."""
        assert number < self.responded()
        return struct.unpack("<QBxh", self.guest.peek(RING, 64 + number % 32 * 112, 12))


def seg(page, first=0, last=7):
    """A segment of a page."""
    return FIRST_REF + page, first, last
