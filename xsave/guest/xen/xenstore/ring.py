"""The shared page between a guest and xenstore: `struct xenstore_domain_interface` (xs_wire.h).

    0     req[1024]   guest -> store          2048  req_cons, req_prod   (u32 each)
    1024  rsp[1024]   store -> guest          2056  rsp_cons, rsp_prod

The indices run freely modulo 2**32. The guest may write anything into the page at any time, so
each index is read once and a distance beyond the ring is an error of the guest's, never a reason
to read or write outside of it.
"""

from __future__ import annotations

import struct

from xsave.errors import GuestStateError
from xsave.guest.xen.xenstore.connection import Connection

RING_SIZE = 1024
REQ_OFFSET, RSP_OFFSET = 0, 1024
REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD = 2048, 2052, 2056, 2060

_U32 = struct.Struct("<I")


def drain_request_ring(page: memoryview) -> bytes:
    """Return the request bytes that wait in the ring and mark them consumed.

    `page` is the writable 4096-byte ring page. Raises GuestStateError on impossible indices."""
    cons, used = _indices(page, REQ_CONS, REQ_PROD, "request")
    start = cons % RING_SIZE
    end = start + used
    data = bytes(page[REQ_OFFSET + start : REQ_OFFSET + min(end, RING_SIZE)])
    data += bytes(page[REQ_OFFSET : REQ_OFFSET + max(end - RING_SIZE, 0)])
    _U32.pack_into(page, REQ_CONS, (cons + used) & 0xFFFF_FFFF)
    return data


def response_room(page: memoryview) -> int:
    """Return how many bytes the response ring has room for; raises GuestStateError likewise."""
    return RING_SIZE - _indices(page, RSP_CONS, RSP_PROD, "response")[1]


def fill_response_ring(page: memoryview, data: bytes) -> int:
    """Put as much of `data` into the response ring as fits, return how many bytes that was.

    Raises GuestStateError on impossible indices."""
    cons, used = _indices(page, RSP_CONS, RSP_PROD, "response")
    count = min(len(data), RING_SIZE - used)
    start = (cons + used) % RING_SIZE
    first = min(count, RING_SIZE - start)
    page[RSP_OFFSET + start : RSP_OFFSET + start + first] = data[:first]
    page[RSP_OFFSET : RSP_OFFSET + count - first] = data[first:count]
    _U32.pack_into(page, RSP_PROD, (cons + used + count) & 0xFFFF_FFFF)
    return count


def service_ring(page: memoryview, connection: Connection) -> bool:
    """Carry requests in and answers out as far as they go; True if the guest must be notified.

    To be called when the guest notifies and after the toolstack changed the store. A guest that
    breaks its ring loses the connection (`connection.dead` says why), nothing else."""
    moved = False
    while connection.dead is None:
        try:
            data = drain_request_ring(page) if connection.wants_input else b""
            connection.feed(data)
            output = connection.take(response_room(page))
            fill_response_ring(page, output)
        except GuestStateError as error:
            connection.kill(str(error))
            break
        if not data and not output:
            break
        moved = True
    return moved


def _indices(page: memoryview, cons_at: int, prod_at: int, name: str) -> tuple[int, int]:
    """Return (cons, bytes in the ring)."""
    cons: int = _U32.unpack_from(page, cons_at)[0]
    prod: int = _U32.unpack_from(page, prod_at)[0]
    used = (prod - cons) & 0xFFFF_FFFF
    if used > RING_SIZE:
        raise GuestStateError(
            f"the guest broke its xenstore {name} ring: "
            f"producer {prod:#x}, consumer {cons:#x}, ring of {RING_SIZE} bytes"
        )
    return cons, used
