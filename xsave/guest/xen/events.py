"""Event channels, in both ABIs: 2-level (bitmaps in shared_info) and FIFO.

A port's pending and masked state lives where the ABI puts it, in frames the guest reads; here
is only what Xen itself keeps: the kind of each port, the vCPU it is bound to, its priority, and
the tail of each FIFO queue. Mirrors xen/common/event_{channel,2l,fifo}.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.pagetable import PageTables
from xsave.guest.xen.pagetypes import PGT_WRITABLE
from xsave.public import SharedInfo

EVTCHNSTAT = {"closed": 0, "unbound": 1, "interdomain": 2, "pirq": 3, "virq": 4, "ipi": 5}
MAX_PORTS = 4096
FIFO_LINK_BITS = 17
FIFO_QUEUES = 16
FIFO_DEFAULT_PRIORITY = 7
_WORDS_PER_PAGE = 1024
_PENDING, _MASKED, _LINKED = 1 << 31, 1 << 30, 1 << 29
_LINK_MASK = (1 << FIFO_LINK_BITS) - 1
VIRQ_TIMER = 0
NR_VIRQS = 24


@dataclass(slots=True)
class Port:
    """One bound port. `notify` is the other end of an interdomain channel (a ring's server)."""

    kind: str
    vcpu: int = 0
    virq: int = -1
    notify: Callable[[], None] | None = None
    remote_domid: int = 0
    priority: int = FIFO_DEFAULT_PRIORITY
    early_pending: bool = False  # set while the FIFO array does not reach the port yet


@dataclass(slots=True)
class FifoQueues:
    """One vCPU's FIFO control block: its machine address and the tail port per priority."""

    control: int
    tails: list[int] = field(default_factory=lambda: [0] * FIFO_QUEUES)


class EventChannels:
    """All ports of one domain. `words` and `bytes_` are views of machine memory."""

    def __init__(self, tables: PageTables, vcpus: list[Vcpu], shared: SharedInfo) -> None:
        self._tables = tables
        self._vcpus = vcpus
        self._shared = shared
        self._words = memoryview(tables.machine.map).cast("I")
        self.ports: dict[int, Port] = {}
        self._fifo: dict[int, FifoQueues] = {}
        self._array: list[int] = []  # machine addresses of the event array's pages

    # -- binding ---

    def bind(self, port: Port) -> int:
        """Allocate the lowest free port. Return it, or -ENOSPC."""
        for number in range(1, MAX_PORTS):
            if number not in self.ports:
                self.ports[number] = port
                self._clear(number)
                return number
        return -errno.ENOSPC

    def bind_virq(self, virq: int, vcpu: int) -> int:
        if not 0 <= virq < NR_VIRQS or not 0 <= vcpu < len(self._vcpus):
            return -errno.EINVAL
        if self.virq_port(virq, vcpu):
            return -errno.EEXIST
        return self.bind(Port("virq", vcpu=vcpu, virq=virq))

    def virq_port(self, virq: int, vcpu: int) -> int:
        """Return the port of a vCPU's virq, 0 if none."""
        for number, port in self.ports.items():
            if port.kind == "virq" and port.virq == virq and port.vcpu == vcpu:
                return number
        return 0

    def close(self, number: int) -> int:
        port = self.ports.get(number)
        if port is None:
            return -errno.EINVAL
        del self.ports[number]
        self._clear(number)
        return 0

    def reset(self) -> None:
        """EVTCHNOP_reset: close all, back to the 2-level ABI."""
        for number in list(self.ports):
            self.close(number)
        pages = [queues.control for queues in self._fifo.values()] + self._array
        for address in pages:
            self._tables.put_type(address >> 12)
        self._fifo.clear()
        self._array.clear()

    def _clear(self, number: int) -> None:
        if self._fifo:
            word = self._word(number)
            if word is not None:
                self._words[word] &= ~_PENDING & 0xFFFFFFFF
        else:
            self._shared.evtchn_pending[number >> 6] &= ~(1 << (number & 63))

    # -- raising ---

    def send(self, number: int) -> int:
        """EVTCHNOP_send by the guest."""
        port = self.ports.get(number)
        if port is None:
            return -errno.EINVAL
        if port.kind == "ipi":
            self.set_pending(number)
        elif port.kind == "interdomain" and port.notify:
            port.notify()
        elif port.kind != "unbound":
            return -errno.EINVAL
        return 0

    def raise_virq(self, virq: int, vcpu: int) -> None:
        number = self.virq_port(virq, vcpu)
        if number:
            self.set_pending(number)

    def set_pending(self, number: int) -> None:
        port = self.ports.get(number)
        if port is None:
            return
        if self._fifo:
            self._fifo_set_pending(number, port)
            return
        shared, index, bit = self._shared, number >> 6, 1 << (number & 63)
        if shared.evtchn_pending[index] & bit:
            return
        shared.evtchn_pending[index] |= bit
        if not shared.evtchn_mask[index] & bit:
            self._mark(port.vcpu, index)

    def _mark(self, vcpu_id: int, index: int) -> None:
        info = self._vcpus[vcpu_id].info
        info.evtchn_pending_sel |= 1 << index
        info.evtchn_upcall_pending = 1

    def unmask(self, number: int) -> int:
        port = self.ports.get(number)
        if port is None:
            return -errno.EINVAL
        if self._fifo:
            word = self._word(number)
            if word is None:
                return -errno.EINVAL
            self._words[word] &= ~_MASKED & 0xFFFFFFFF
            if self._words[word] & _PENDING:
                self._fifo_link(number, port, word)
            return 0
        shared, index, bit = self._shared, number >> 6, 1 << (number & 63)
        shared.evtchn_mask[index] &= ~bit
        if shared.evtchn_pending[index] & bit:
            self._mark(port.vcpu, index)
        return 0

    def is_pending(self, number: int) -> bool:
        if self._fifo:
            word = self._word(number)
            return word is not None and bool(self._words[word] & _PENDING)
        return bool(self._shared.evtchn_pending[number >> 6] >> (number & 63) & 1)

    # -- FIFO ---

    def init_control(self, gfn: int, offset: int, vcpu: int) -> int:
        """EVTCHNOP_init_control: the first one switches the domain to the FIFO ABI."""
        if not 0 <= vcpu < len(self._vcpus) or offset > 4096 - 72 or offset & 7:
            return -errno.EINVAL
        if vcpu in self._fifo:
            return -errno.EINVAL
        rc = self._tables.get_type(gfn, PGT_WRITABLE)
        if rc:
            return rc
        if not self._fifo:
            for number, port in self.ports.items():
                port.early_pending = self.is_pending(number)
        self._fifo[vcpu] = FifoQueues((gfn << 12) + offset)
        return 0

    def expand_array(self, gfn: int) -> int:
        if not self._fifo:
            return -errno.EINVAL
        if len(self._array) * _WORDS_PER_PAGE >= MAX_PORTS:
            return -errno.ENOSPC
        rc = self._tables.get_type(gfn, PGT_WRITABLE)
        if rc:
            return rc
        self._array.append(gfn << 12)
        for number, port in self.ports.items():
            if port.early_pending and self._word(number) is not None:
                port.early_pending = False
                self._fifo_set_pending(number, port)
        return 0

    def _word(self, number: int) -> int | None:
        page, index = divmod(number, _WORDS_PER_PAGE)
        return (self._array[page] >> 2) + index if page < len(self._array) else None

    def _fifo_set_pending(self, number: int, port: Port) -> None:
        word = self._word(number)
        if word is None:
            port.early_pending = True
            return
        self._words[word] |= _PENDING
        self._fifo_link(number, port, word)

    def _fifo_link(self, number: int, port: Port, word: int) -> None:
        """Append a pending, unmasked, not yet linked port to its vCPU's queue."""
        if self._words[word] & (_MASKED | _LINKED):
            return
        queues = self._fifo.get(port.vcpu)
        if queues is None:
            return
        self._words[word] = (self._words[word] & ~_LINK_MASK) | _LINKED
        tail = queues.tails[port.priority]
        # A port that is its queue's own tail must not be linked behind itself: it would point
        # to itself for ever and every later event would be lost.
        tail_word = self._word(tail) if tail and tail != number else None
        if tail_word is not None and self._words[tail_word] & _LINKED:
            self._words[tail_word] = (self._words[tail_word] & ~_LINK_MASK) | number
        else:
            self._words[(queues.control >> 2) + 2 + port.priority] = number
        queues.tails[port.priority] = number
        self._words[queues.control >> 2] |= 1 << port.priority
        self._vcpus[port.vcpu].info.evtchn_upcall_pending = 1
