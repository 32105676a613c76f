"""What a guest's kernel does with its event channels, for the tests of both ABIs."""

from __future__ import annotations

import struct

from xsave.guest.xen.events import FIFO_LINK_BITS, MAX_PORTS, Port

PENDING, MASKED, LINKED = 1 << 31, 1 << 30, 1 << 29
LINK = (1 << FIFO_LINK_BITS) - 1
CONTROL, OFFSET, ARRAY = 3, 0x100, 4  # pages of the guest, and where the control block is in its


class Channels:
    """A guest's event channels and what its kernel does with them."""

    def __init__(self, guest):
        self.guest = guest
        self.events = guest.domain.events
        self.shared = guest.domain.shared
        self.info = guest.vcpu.info
        self.shared.evtchn_mask[0:64] = [0] * 64

    def bind(self, nr=1, **port):
        return [self.events.bind(Port("ipi", **port)) for _ in range(nr)]

    # -- the guest's half of the FIFO ABI (drivers/xen/events/events_fifo.c) ---

    def fifo(self, pages=1):
        """Switch to the FIFO ABI, all ports unmasked."""
        frames = self.guest.frames
        assert self.events.init_control(frames[CONTROL], OFFSET, 0) == 0
        for i in range(pages):
            assert self.events.expand_array(frames[ARRAY + i]) == 0
        return self

    def word(self, port, value=None):
        page, at = ARRAY + port // 1024, 4 * (port % 1024)
        if value is not None:
            self.guest.poke(page, at, struct.pack("<I", value))
        return struct.unpack("<I", self.guest.peek(page, at, 4))[0]

    def control(self, index, value=None):
        at = OFFSET + 4 * index
        if value is not None:
            self.guest.poke(CONTROL, at, struct.pack("<I", value))
        return struct.unpack("<I", self.guest.peek(CONTROL, at, 4))[0]

    def consume(self):
        """Handle all events as Linux does; return the ports in the order they came."""
        handled = []
        self.info.evtchn_upcall_pending = 0
        ready = self.control(0)
        self.control(0, 0)
        for queue in range(16):
            if ready >> queue & 1:
                self._consume_queue(queue, handled)
        return handled

    def _consume_queue(self, queue, handled):
        port = self.control(2 + queue)
        for _ in range(MAX_PORTS):
            if not port:
                return
            word = self.word(port)
            link = word & LINK
            self.word(port, word & ~(LINKED | LINK))
            self.control(2 + queue, link)
            if self.word(port) & PENDING and not self.word(port) & MASKED:
                self.word(port, self.word(port) & ~PENDING)
                handled.append(port)
            port = link
        raise AssertionError("the queue has a loop")
