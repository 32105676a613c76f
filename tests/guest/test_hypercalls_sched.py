"""sched_op, vcpu_op, set_timer_op, event_channel_op: waiting, and being told."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.guest.calling import ARGS, FAULT, M64, OUT, REFUSED, UNKNOWN, call
from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.events import MAX_PORTS, Port
from xsave.public import SHUTDOWN_NAMES

SCHED, SET_TIMER, VCPU, EVTCHN = 29, 15, 24, 32
SELF = 0x7FF0
BIND_VIRQ, CLOSE, SEND, STATUS, ALLOC_UNBOUND, BIND_IPI, BIND_VCPU, UNMASK, RESET = (
    1, 3, 4, 5, 6, 7, 8, 9, 10,
)  # fmt: skip
INIT_CONTROL, EXPAND_ARRAY, SET_PRIORITY = 11, 12, 13

pytestmark = pytest.mark.usefixtures("asking")


def ask(guest, number, command, layout="", *values, vcpu=None):
    """Make a call whose argument is a structure."""
    guest.poke(ARGS, 0, struct.pack("<" + layout, *values))
    arguments = [command, guest.va(ARGS)] if vcpu is None else [command, vcpu, guest.va(ARGS)]
    return call(guest, number, *arguments)


def answer(guest, layout, offset):
    return struct.unpack("<" + layout, guest.peek(ARGS, offset, struct.calcsize("<" + layout)))


# -- sched_op ---


@pytest.mark.parametrize("reason", range(len(SHUTDOWN_NAMES)))
def test_shutdown(guest, reason):
    """Every reason Xen knows ends the domain with that reason; others do not."""
    assert ask(guest, SCHED, 2, "I", len(SHUTDOWN_NAMES)) == REFUSED
    assert ask(guest, SCHED, 2, "I", 1 << 31) == REFUSED
    assert guest.domain.shutdown_reason is None
    assert ask(guest, SCHED, 2, "I", reason) == 0
    assert guest.domain.shutdown_reason == reason


def test_block(guest):
    """Blocking unmasks upcalls, and blocks unless one is pending."""
    info = guest.vcpu.info
    info.evtchn_upcall_pending = 1
    assert call(guest, SCHED, 1) == 0
    assert not guest.vcpu.blocked
    info.evtchn_upcall_mask, info.evtchn_upcall_pending = 1, 0
    assert call(guest, SCHED, 1) == 0
    assert guest.vcpu.blocked
    assert info.evtchn_upcall_mask == 0


def poll(guest, ports, timeout=0, nr=None):
    guest.poke(OUT, 0, struct.pack(f"<{len(ports)}I", *ports))
    nr = len(ports) if nr is None else nr
    return ask(guest, SCHED, 3, "QIxxxxQ", guest.va(OUT), nr, timeout)


def test_poll(guest):
    """Polling blocks until a port is pending or the time is come; it returns at once if one is."""
    port = guest.domain.events.bind(Port("ipi"))
    assert poll(guest, [port, 40], timeout=77) == 0
    assert guest.vcpu.blocked
    assert guest.vcpu.polling == (port, 40)
    assert guest.vcpu.poll_deadline_ns == 77
    guest.vcpu.blocked = False
    assert poll(guest, [port]) == 0
    assert guest.vcpu.poll_deadline_ns is None
    guest.vcpu.blocked = False
    guest.domain.events.set_pending(port)
    assert poll(guest, [40, port]) == 0
    assert not guest.vcpu.blocked


@pytest.mark.parametrize("ports", [[MAX_PORTS], [1, (1 << 32) - 1], list(range(129))])
def test_poll_of_what_cannot_be(guest, ports):
    """A port that cannot exist, or too many, is refused before anything waits for it."""
    assert poll(guest, ports) == REFUSED
    assert not guest.vcpu.blocked
    assert guest.vcpu.polling == ()


def test_yield_and_the_rest(guest):
    """Yielding blocks nothing; what is not known is -ENOSYS."""
    assert call(guest, SCHED, 0) == 0
    assert not guest.vcpu.blocked
    assert call(guest, SCHED, 4) == call(guest, SCHED, M64) == UNKNOWN


# -- timers and vcpu_op ---


def test_timers(guest):
    """A timer is set, replaced and cancelled by either hypercall; one that should lie in the
    future and does not is -ETIME."""
    vcpu = guest.vcpu
    assert call(guest, SET_TIMER, 500) == 0
    assert vcpu.timer_ns == 500
    assert call(guest, SET_TIMER, 0) == 0
    assert vcpu.timer_ns is None
    guest.domain.clock.slice()
    now = guest.domain.clock.now()
    assert ask(guest, VCPU, 8, "QI", now, 1, vcpu=0) == -errno.ETIME
    assert vcpu.timer_ns is None
    assert ask(guest, VCPU, 8, "QI", now + 1, 1, vcpu=0) == 0
    assert vcpu.timer_ns == now + 1
    assert ask(guest, VCPU, 8, "QI", 0, 0, vcpu=0) == 0
    assert vcpu.timer_ns == 0
    assert call(guest, VCPU, 9, 0, 0) == 0
    assert vcpu.timer_ns is None


def test_a_vcpu_info_of_its_own(guest):
    """register_vcpu_info moves the record into a frame of the guest's, with all it held, and says
    that every port should be looked at; a second time is refused."""
    info = guest.vcpu.info
    info.evtchn_upcall_mask, info.cr2 = 1, 0xABC
    assert ask(guest, VCPU, 10, "QII", guest.frames[6], 64, 0, vcpu=0) == 0
    moved = guest.vcpu.info
    assert (moved.evtchn_upcall_mask, moved.cr2, moved.evtchn_upcall_pending) == (1, 0xABC, 1)
    assert moved.evtchn_pending_sel == M64
    moved.cr2 = 0xDEF
    assert guest.peek(6, 64 + 16, 8) == struct.pack("<Q", 0xDEF)
    assert info.cr2 == 0xABC
    assert ask(guest, VCPU, 10, "QII", guest.frames[7], 0, 0, vcpu=0) == REFUSED
    guest.unmap(6)
    assert guest.tables.pin(guest.frames[6], 1) == REFUSED


@pytest.mark.parametrize("offset", [4, 4096 - 56, 4096, 1 << 31])
def test_a_vcpu_info_that_does_not_fit(guest, offset, foreign):
    """Misaligned, over the end of the page, or in a frame that is not an ordinary one of the
    guest's: refused, and the old place stays."""
    info = guest.vcpu.info
    assert ask(guest, VCPU, 10, "QII", guest.frames[6], offset, 0, vcpu=0) == REFUSED
    for mfn in (foreign, guest.l1, guest.domain.scratch_mfn, 1, M64):
        assert ask(guest, VCPU, 10, "QII", mfn, 0, 0, vcpu=0) == REFUSED
    assert guest.vcpu.info is info
    assert guest.vcpu.info_mfn is None


@pytest.fixture
def other(guest):
    """A second vCPU of the guest's, up."""
    vcpu = Vcpu(1, guest.domain.shared.vcpu_info[1])
    vcpu.initialised = vcpu.online = True
    guest.domain.vcpus.append(vcpu)
    return vcpu


def test_another_vcpus_info_is_moved_while_it_is_down(guest, other):
    """The vcpu_info of a vCPU that is up is its own to move; of one that is down, or was never
    up, anybody's (a guest does that for all its vCPUs after a restore)."""
    place = ("QII", guest.frames[6], 64, 0)
    assert ask(guest, VCPU, 10, *place, vcpu=1) == REFUSED
    assert other.info_mfn is None
    assert call(guest, VCPU, 2, 1) == 0
    assert ask(guest, VCPU, 10, *place, vcpu=1) == 0
    assert other.info_mfn == guest.frames[6]
    assert call(guest, VCPU, 1, 1) == 0
    assert call(guest, VCPU, 3, 1) == 1


def test_timers_of_other_vcpus(guest, other):
    """A vCPU sets and stops no singleshot timer but its own."""
    assert ask(guest, VCPU, 8, "QI", 500, 0, vcpu=1) == REFUSED
    assert other.timer_ns is None
    other.timer_ns = 600
    assert call(guest, VCPU, 9, 1) == REFUSED
    assert other.timer_ns == 600


def test_other_vcpu_operations(guest):
    """The one vCPU is up; there are no others; what is not known is -ENOSYS."""
    assert call(guest, VCPU, 3, 0, 0) == 1
    for vcpu in (1, 32, M64):
        assert call(guest, VCPU, 3, vcpu, 0) == -errno.ENOENT
    assert call(guest, VCPU, 7, 0, 0) == call(guest, VCPU, 5, 0, 0) == 0
    assert call(guest, VCPU, 0, 0, guest.va(ARGS)) == -errno.EEXIST
    assert call(guest, VCPU, 11, 0, 0) == UNKNOWN


# -- event_channel_op ---


def test_ports_by_hypercall(guest):
    """virqs, ipis and unbound ports are bound and their numbers told; status tells their kind."""
    assert ask(guest, EVTCHN, BIND_VIRQ, "II", 3, 0) == 0
    (virq,) = answer(guest, "I", 8)
    assert ask(guest, EVTCHN, BIND_IPI, "I", 0) == 0
    (ipi,) = answer(guest, "I", 4)
    assert ask(guest, EVTCHN, ALLOC_UNBOUND, "HH", SELF, 0) == 0
    (unbound,) = answer(guest, "I", 4)
    assert (virq, ipi, unbound) == (1, 2, 3)
    for port, status, detail in ((virq, 4, 3), (ipi, 5, 0), (unbound, 1, 0), (9, 0, 0)):
        assert ask(guest, EVTCHN, STATUS, "HxxI", SELF, port) == 0
        assert answer(guest, "III", 8) == (status, 0, detail)
    assert ask(guest, EVTCHN, BIND_VIRQ, "II", 3, 0) == -errno.EEXIST
    assert ask(guest, EVTCHN, BIND_IPI, "I", 1) == -errno.ENOENT
    assert ask(guest, EVTCHN, ALLOC_UNBOUND, "HH", 5, 0) == -errno.EPERM
    assert ask(guest, EVTCHN, STATUS, "HxxI", 5, 1) == -errno.ESRCH


@pytest.mark.parametrize(
    ("command", "layout", "values"),
    [(BIND_VIRQ, "II", (3, 0)), (BIND_IPI, "I", (0,)), (ALLOC_UNBOUND, "HH", (SELF, 0))],
)
def test_a_port_that_cannot_be_told_is_not_bound(guest, command, layout, values):
    """If the number cannot be written to the guest, the port is free again."""
    packed = struct.pack("<" + layout, *values)
    last = guest.nr - 1
    for page in range(guest.nr, guest.nr + 4):
        guest.tables.update_entry(guest.l1, page, 0)
    guest.poke(last, 4096 - len(packed), packed)
    assert call(guest, EVTCHN, command, guest.va(last, 4096 - len(packed))) == FAULT
    assert not guest.domain.events.ports


def test_ports_are_sent_unmasked_and_closed(guest):
    """send, unmask and close work on bound ports and are -EINVAL on others."""
    events = guest.domain.events
    port = events.bind(Port("ipi"))
    assert ask(guest, EVTCHN, SEND, "I", port) == 0
    assert events.is_pending(port)
    assert not guest.vcpu.info.evtchn_upcall_pending
    assert ask(guest, EVTCHN, UNMASK, "I", port) == 0
    assert guest.vcpu.info.evtchn_upcall_pending
    assert ask(guest, EVTCHN, CLOSE, "I", port) == 0
    for command in (SEND, UNMASK, CLOSE):
        for number in (port, 0, MAX_PORTS, (1 << 32) - 1):
            assert ask(guest, EVTCHN, command, "I", number) == REFUSED


def test_ports_are_bound_to_vcpus(guest):
    """bind_vcpu moves a port to a vCPU that exists; an ipi stays where it is."""
    events = guest.domain.events
    virq, ipi = events.bind_virq(3, 0), events.bind(Port("ipi"))
    assert ask(guest, EVTCHN, BIND_VCPU, "II", virq, 0) == 0
    assert ask(guest, EVTCHN, BIND_VCPU, "II", virq, 1) == -errno.ENOENT
    for port in (ipi, 77):
        assert ask(guest, EVTCHN, BIND_VCPU, "II", port, 0) == REFUSED


def test_fifo_by_hypercall(guest):
    """init_control tells the size of its links, expand_array adds a page, set_priority moves a
    port; reset ends it all."""
    events = guest.domain.events
    port = events.bind(Port("ipi"))
    assert ask(guest, EVTCHN, EXPAND_ARRAY, "Q", guest.frames[6]) == REFUSED
    assert ask(guest, EVTCHN, INIT_CONTROL, "QII", guest.frames[5], 0, 0) == 0
    assert answer(guest, "B", 16) == (17,)
    assert ask(guest, EVTCHN, EXPAND_ARRAY, "Q", guest.frames[6]) == 0
    assert ask(guest, EVTCHN, SET_PRIORITY, "II", port, 2) == 0
    assert ask(guest, EVTCHN, SET_PRIORITY, "II", port, 16) == REFUSED
    assert ask(guest, EVTCHN, SET_PRIORITY, "II", 99, 2) == REFUSED
    assert ask(guest, EVTCHN, SEND, "I", port) == 0
    assert struct.unpack("<I", guest.peek(5, 0, 4))[0] == 1 << 2
    assert call(guest, EVTCHN, RESET, guest.va(ARGS)) == 0
    assert not events.ports
    assert call(guest, EVTCHN, 14, guest.va(ARGS)) == UNKNOWN
