"""A xenstore server as pure code: the store, one guest's connection to it, the shared ring.

    toolstack --- XenStore.read/write/rm/ls/watch ---.
                                                     store.py   nodes, transactions, watches, quotas
    guest ring -- ring.py -- Connection (wire ops) --'
                              connection.py, requests.py

Nothing in here does I/O, keeps time or knows an event channel: whoever owns the ring page calls
`service_ring(page, connection)` when the guest notifies or the store was changed, and notifies
the guest where that returns True. Mirrors xen/tools/xenstored; the protocol is
docs/misc/xenstore.txt and xen/include/public/io/xs_wire.h.

What it leaves out, knowingly: permissions are kept and answered but not enforced (a store belongs
to one domain and its toolstack), and nothing is kept when the process ends: a restored guest
registers its watches again, as it must on any Xen.
"""

from xsave.guest.xen.xenstore.connection import Connection
from xsave.guest.xen.xenstore.requests import Op
from xsave.guest.xen.xenstore.ring import drain_request_ring, fill_response_ring, service_ring
from xsave.guest.xen.xenstore.store import Quota, Watch, WireError, XenStore

__all__ = [
    "Connection",
    "Op",
    "Quota",
    "Watch",
    "WireError",
    "XenStore",
    "drain_request_ring",
    "fill_response_ring",
    "service_ring",
]
