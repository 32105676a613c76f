"""Event channels: ports, and the 2-level ABI as a guest sees it in its shared_info."""

from __future__ import annotations

import errno

import pytest

from tests.guest.channels import Channels
from xsave.guest.xen.events import MAX_PORTS, NR_VIRQS, VIRQ_TIMER, Port


@pytest.fixture
def channels(guest):
    return Channels(guest)


# -- ports ---


def test_ports_are_given_out_from_one_up(channels):
    """bind() gives the lowest free port, never 0, and says so when there are none left."""
    events = channels.events
    assert channels.bind(3) == [1, 2, 3]
    assert events.close(2) == 0
    assert channels.bind() == [2]
    assert events.close(2) == 0
    assert events.close(2) == events.close(0) == events.close(MAX_PORTS) == -errno.EINVAL
    channels.bind(MAX_PORTS - 3)
    assert channels.bind() == [-errno.ENOSPC]
    assert max(events.ports) == MAX_PORTS - 1


def test_virqs_are_bound_once(channels):
    """A virq has one port per vCPU; what does not exist cannot be bound; raising it sets that
    port, and nothing where it is not bound."""
    events = channels.events
    port = events.bind_virq(VIRQ_TIMER, 0)
    assert events.virq_port(VIRQ_TIMER, 0) == port
    assert events.bind_virq(VIRQ_TIMER, 0) == -errno.EEXIST
    for virq, vcpu in ((NR_VIRQS, 0), (-1, 0), (1, 1), (1, -1), (1 << 31, 0)):
        assert events.bind_virq(virq, vcpu) == -errno.EINVAL
    events.raise_virq(3, 0)
    assert not channels.info.evtchn_upcall_pending
    events.raise_virq(VIRQ_TIMER, 0)
    assert events.is_pending(port)


def test_send_reaches_the_other_end(channels):
    """Sending on an interdomain port tells its other end, on an ipi this vCPU, on an unbound one
    nobody, and is refused on any other."""
    heard = []
    events = channels.events
    ring = events.bind(Port("interdomain", notify=lambda: heard.append(1)))
    (ipi,) = channels.bind()
    assert events.send(ring) == events.send(ring) == 0
    assert len(heard) == 2
    assert not events.is_pending(ring)
    assert events.send(ipi) == 0
    assert events.is_pending(ipi)
    assert events.send(events.bind(Port("unbound"))) == 0
    for port in (0, 99, MAX_PORTS, 1 << 31, events.bind_virq(VIRQ_TIMER, 0)):
        assert events.send(port) == -errno.EINVAL


# -- two levels ---


@pytest.mark.parametrize("port", [1, 63, 64, 65, 130, MAX_PORTS - 1])
def test_a_pending_port_is_seen_at_both_levels(channels, port):
    """Raising an unmasked port sets its bit, its word's bit and the upcall, once."""
    channels.bind(port)
    events, shared, info = channels.events, channels.shared, channels.info
    events.set_pending(port)
    pending = list(shared.evtchn_pending)
    assert pending[port >> 6] == 1 << (port & 63)
    assert pending.count(0) == 63
    assert info.evtchn_pending_sel == 1 << (port >> 6)
    assert info.evtchn_upcall_pending == 1
    info.evtchn_upcall_pending = info.evtchn_pending_sel = 0
    events.set_pending(port)
    assert (info.evtchn_upcall_pending, info.evtchn_pending_sel) == (0, 0)


def test_a_masked_port_is_raised_by_unmasking(channels):
    """A masked port becomes pending without an upcall; unmasking it brings the upcall; unmasking
    a port that is not pending brings none."""
    first, second = channels.bind(2)
    events, shared, info = channels.events, channels.shared, channels.info
    shared.evtchn_mask[0] = 0xFF
    events.set_pending(first)
    assert events.is_pending(first)
    assert not info.evtchn_upcall_pending
    assert events.unmask(second) == 0
    assert not info.evtchn_upcall_pending
    assert events.unmask(first) == 0
    assert (info.evtchn_upcall_pending, info.evtchn_pending_sel) == (1, 1)
    assert shared.evtchn_mask[0] == 0xFF & ~(1 << first | 1 << second)
    assert events.unmask(99) == -errno.EINVAL


def test_a_closed_port_is_forgotten(channels):
    """Closing clears what was pending, and a closed port cannot become so; its next owner
    starts clean."""
    (port,) = channels.bind()
    channels.events.set_pending(port)
    channels.events.close(port)
    assert not channels.events.is_pending(port)
    channels.events.set_pending(port)
    assert not channels.events.is_pending(port)
    channels.shared.evtchn_pending[0] = 1 << port  # the guest wrote it itself
    assert channels.bind() == [port]
    assert not channels.events.is_pending(port)
