"""Deeds on what is shared: the console's and xenstore's rings, event channels, their FIFO pages."""

from __future__ import annotations

import struct

from tests.fuzz.guest import layout
from tests.fuzz.guest.layout import SCRATCH, va
from xsave.guest.xen.xenstore import ring

_EVENT_OP, _SEND = 32, 4
_CONSOLE_IN_CONS = 3072
_HEADER = struct.Struct("<4I")
_PATHS = (
    b"", b"/", b"a", b"device", b"control/shutdown", b"/local/domain/1/name", b"memory/target",
    b"/local/domain/0", b"../x", b"//", b"a/" * 200, b"@introduceDomain", b"@releaseDomain",
    b"data",
    b"/local/domain/2/control/shutdown", b"x" * 3000, b"attr/y", b"error/z",
)  # fmt: skip

_WORDS = (b"T", b"F", b"0", b"token", b"n0", b"b1", b"r2", b"1", b"9" * 12, b"\xff")


def _send(kernel, port):
    kernel.code.store(SCRATCH, port)
    kernel.code.hypercall(_EVENT_OP, _SEND, SCRATCH)


def console(kernel):
    """Any indices, any output."""
    rng, code = kernel.rng, kernel.code
    page = va(layout.CONSOLE_PFN)
    if rng.random() < 0.3:
        code.fill(page, rng.getrandbits(64), 384)
    for offset in (0, 8):
        words = rng.choice((rng.getrandbits(64), rng.randrange(4096), rng.randrange(4096) << 32))
        code.store(page + _CONSOLE_IN_CONS + offset, words)
    _send(kernel, layout.CONSOLE_PORT)


def console_flood(kernel):
    """More output than any log holds."""
    kernel.code.hypercall(18, 0, kernel.rng.choice((4096, 5000, 1 << 40)), va(layout.CODE_PFN))


def store_indices(kernel):
    """Indices of the xenstore ring beyond reason."""
    rng, code = kernel.rng, kernel.code
    for offset in (ring.REQ_CONS, ring.RSP_CONS):
        if rng.random() < 0.5:
            low = rng.choice((0, rng.getrandbits(32), rng.randrange(1025)))
            code.store(
                va(layout.STORE_PFN, offset), rng.choice((low, low << 32, rng.getrandbits(64)))
            )
    _send(kernel, layout.STORE_PORT)


def store_requests(kernel):
    """Requests: most well formed, some endless, some of no kind. They are put where the ring goes
    on if nobody broke it before; what is answered is read, or not."""
    rng, code = kernel.rng, kernel.code
    messages = b"".join(_message(rng) for _ in range(rng.randrange(1, 5)))[:1024]
    source = kernel.keep(messages)
    if not source:
        return
    page = va(layout.STORE_PFN)
    code.store(page + ring.REQ_CONS, len(messages) << 32)
    if rng.random() < 0.8:
        code.store(page + ring.RSP_CONS, 0)
    code.copy(source, page, len(messages))
    for _ in range(rng.choice((1, 1, 3))):
        _send(kernel, layout.STORE_PORT)


def _message(rng):
    parts = [rng.choice(_PATHS), *(rng.choice(_WORDS) for _ in range(rng.randrange(3)))]
    payload = b"\0".join(parts) + rng.choice((b"", b"\0"))
    length = len(payload) if rng.random() < 0.9 else rng.choice((0, 4096, 4097, 1 << 31, 7))
    tx = rng.choice((0, 0, 0, 1, 2, rng.getrandbits(32)))
    return _HEADER.pack(rng.randrange(24), rng.getrandbits(32), tx, length) + payload


def watches(kernel):
    """Watches on everything, and changes: each makes more to say."""
    rng, code = kernel.rng, kernel.code
    message = b""
    for i in range(rng.randrange(1, 6)):
        payload = b"\0".join((rng.choice((b"/", b"data", b"", b"/local")), b"t%d" % i, b""))
        message += _HEADER.pack(4, i, 0, len(payload)) + payload
        payload = b"data/%d\0value" % rng.randrange(2000)
        message += _HEADER.pack(11, i, 0, len(payload)) + payload
    source = kernel.keep(message[:1024])
    if source:
        page = va(layout.STORE_PFN)
        code.copy(source, page, len(message[:1024]))
        code.store(page + ring.REQ_CONS, len(message[:1024]) << 32)
        code.store(page + ring.RSP_CONS, 0)
        _send(kernel, layout.STORE_PORT)


def events(kernel):
    """Ports bound, sent to, closed, moved; the FIFO ABI on any frames, with any words in them."""
    rng, code = kernel.rng, kernel.code
    for _ in range(rng.randrange(1, 6)):
        command = rng.choice((0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 12, 12, 13))
        letters = "f0c" if command in (11, 12) else "cc0"
        code.store_words(SCRATCH, [kernel.word(letter) for letter in letters])
        code.hypercall(_EVENT_OP, command, SCRATCH)
    if rng.random() < 0.5:
        code.fill(va(layout.SCRATCH_PFN + rng.randrange(12)), rng.getrandbits(64), 512)


RING_DEEDS = {
    "console": console,
    "console flood": console_flood,
    "store indices": store_indices,
    "store requests": store_requests,
    "watches": watches,
    "events": events,
}
