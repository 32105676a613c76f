"""From a request to a job: checked, its grants mapped.

A frontend that says it is persistent uses the same few frames again and again and copies from
and to them itself: those stay mapped. For any other, the bytes go straight where it wants them,
perhaps over code that the emulator has translated: `Mapper.dirtied` tells.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xsave.guest.xen.blkback.disk import Disk
from xsave.guest.xen.blkback.ring import MAX_SEGMENTS, NR_SLOTS, Request
from xsave.guest.xen.grants import Grant, GrantTable

SECTOR_BYTES = 512
OP_READ, OP_WRITE, OP_BARRIER, OP_FLUSH, _OP_RESERVED, OP_DISCARD, OP_INDIRECT = range(7)
RSP_OKAY, RSP_ERROR, RSP_EOPNOTSUPP = 0, -1, -2
_NOT_OFFERED = {OP_BARRIER, OP_DISCARD, OP_INDIRECT}
_SECTORS_PER_PAGE = 8
#: As many frames as can be in use at once, three times over.
_MAX_PERSISTENT = 3 * NR_SLOTS * MAX_SEGMENTS


@dataclass(slots=True)
class Job:
    """One request on its way. `run` may be called in any thread; nothing else of the guest's is
    touched there but `buffers`."""

    request: Request
    buffers: list[memoryview]
    grants: list[Grant]
    failed: bool = field(default=False)

    def run(self, disk: Disk) -> None:
        """Do it; `failed` says whether it did not work."""
        offset = self.request.sector * SECTOR_BYTES
        try:
            if self.request.op == OP_READ:
                disk.read(offset, self.buffers)
                return
            if self.request.op == OP_FLUSH:
                disk.flush()
            if self.buffers:
                disk.write(offset, self.buffers)
                if self.request.op == OP_FLUSH:
                    disk.flush()
        except Exception:  # noqa: BLE001 - whatever is wrong with the disk, the guest must hear
            self.failed = True


class Refused(Exception):
    """A request that is not even tried; `status` answers it."""

    def __init__(self, status: int = RSP_ERROR) -> None:
        super().__init__(status)
        self.status = status


class Mapper:
    """Makes jobs of one frontend's requests, and undoes them."""

    def __init__(self, grants: GrantTable, *, persistent: bool) -> None:
        self._grants = grants
        self._persistent = persistent
        self._kept: dict[int, Grant] = {}
        #: Bytes came to frames where the guest's own code may be; whoever sees to it resets it.
        self.dirtied = False

    def prepare(self, request: Request, disk: Disk) -> Job:
        """Raises Refused; nothing is mapped then."""
        _check(request, disk)
        grants: list[Grant] = []
        buffers = []
        try:
            for ref, first, last in request.segments:
                grant = self._map(ref, readonly=request.op != OP_READ)
                grants.append(grant)
                page = self._grants.page(grant)
                buffers.append(page[first * SECTOR_BYTES : (last + 1) * SECTOR_BYTES])
        except Refused:
            self._unmap(grants)
            raise
        return Job(request, buffers, grants)

    def finish(self, job: Job) -> int:
        """Unmap what need not stay; return the status to answer with."""
        if job.request.op == OP_READ and any(g.ref not in self._kept for g in job.grants):
            self.dirtied = True
        job.buffers = []
        self._unmap(job.grants)
        return RSP_ERROR if job.failed else RSP_OKAY

    def _map(self, ref: int, *, readonly: bool) -> Grant:
        if ref in self._kept:
            return self._kept[ref]
        keep = self._persistent and len(self._kept) < _MAX_PERSISTENT
        grant = self._grants.map(ref, readonly=readonly and not keep)
        if isinstance(grant, int) and keep and readonly:
            keep, grant = False, self._grants.map(ref, readonly=True)
        if isinstance(grant, int):
            raise Refused
        if keep:
            self._kept[ref] = grant
        return grant

    def _unmap(self, grants: list[Grant]) -> None:
        for grant in grants:
            if self._kept.get(grant.ref) is not grant:
                self._grants.unmap(grant)

    def release(self) -> None:
        """The frontend is gone: unmap what stayed."""
        for grant in self._kept.values():
            self._grants.unmap(grant)
        self._kept.clear()


def _check(request: Request, disk: Disk) -> None:
    """What xen-blkback's dispatch_rw_block_io checks. Raises Refused."""
    if request.op in _NOT_OFFERED:
        raise Refused(RSP_EOPNOTSUPP)
    if request.op not in (OP_READ, OP_WRITE, OP_FLUSH) or request.nr_segments > MAX_SEGMENTS:
        raise Refused
    if not request.nr_segments:
        if request.op != OP_FLUSH:
            raise Refused
        return
    if request.op != OP_READ and disk.readonly:
        raise Refused
    if any(first > last or last >= _SECTORS_PER_PAGE for _, first, last in request.segments):
        raise Refused
    nr_sectors = sum(last - first + 1 for _, first, last in request.segments)
    if request.sector + nr_sectors > disk.nr_sectors:
        raise Refused
