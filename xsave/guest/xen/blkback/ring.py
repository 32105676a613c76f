"""The shared ring of a block device, one page, in its 64-bit layout (io/ring.h, io/blkif.h).

    0   req_prod, req_event, rsp_prod, rsp_event (u32 each), to byte 64
    64  32 slots of 112 bytes; a response lies in its request's slot or another free one

The guest may write anything there at any time: each request is copied once, and indices that
cannot be are the end of the ring, never a reason to look elsewhere.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from xsave.errors import GuestStateError

NR_SLOTS = 32
MAX_SEGMENTS = 11
_SLOTS, _SLOT_BYTES = 64, 112
_REQ_PROD, _REQ_EVENT, _RSP_PROD, _RSP_EVENT = 0, 4, 8, 12
_U32 = struct.Struct("<I")
_REQUEST = struct.Struct("<BBHxxxxQQ")
_SEGMENT = struct.Struct("<IBBxx")
_RESPONSE = struct.Struct("<QBxh")
_M32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Request:
    """`segments`: (grant reference, first sector, last sector) of the page, as many as it says
    it has, at most MAX_SEGMENTS."""

    op: int
    nr_segments: int
    id: int
    sector: int
    segments: tuple[tuple[int, int, int], ...]


class BackRing:
    """The backend's end of the ring in `page`, a writable memoryview of 4096 bytes."""

    def __init__(self, page: memoryview) -> None:
        self._page = page
        self._rsp_prod = self._get(_RSP_PROD)
        self._req_cons = self._rsp_prod

    def _get(self, offset: int) -> int:
        value: int = _U32.unpack_from(self._page, offset)[0]
        return value

    def take(self) -> Request | None:
        """Return the next request; None: there is none, and the guest will tell when there is.

        Raises GuestStateError if the indices cannot be (RING_REQUEST_PROD_OVERFLOW)."""
        produced = self._get(_REQ_PROD)
        if (produced - self._rsp_prod) & _M32 > NR_SLOTS:
            raise GuestStateError(
                f"the guest broke its block ring: requests up to {produced:#x}, "
                f"answered up to {self._rsp_prod:#x}, {NR_SLOTS} slots"
            )
        if produced == self._req_cons:
            _U32.pack_into(self._page, _REQ_EVENT, (self._req_cons + 1) & _M32)
            return None
        slot = self._slot(self._req_cons)
        raw = bytes(self._page[slot : slot + _SLOT_BYTES])
        self._req_cons = (self._req_cons + 1) & _M32
        op, nr, _handle, request_id, sector = _REQUEST.unpack_from(raw)
        segments = tuple(
            _SEGMENT.unpack_from(raw, _REQUEST.size + i * _SEGMENT.size)
            for i in range(min(nr, MAX_SEGMENTS))
        )
        return Request(op, nr, request_id, sector, segments)

    def respond(self, request: Request, status: int) -> bool:
        """Answer a request; return whether the guest wants to be told (RING_PUSH_RESPONSES)."""
        _RESPONSE.pack_into(self._page, self._slot(self._rsp_prod), request.id, request.op, status)
        self._rsp_prod = (self._rsp_prod + 1) & _M32
        _U32.pack_into(self._page, _RSP_PROD, self._rsp_prod)
        return self._get(_RSP_EVENT) == self._rsp_prod

    @staticmethod
    def _slot(index: int) -> int:
        return _SLOTS + index % NR_SLOTS * _SLOT_BYTES
