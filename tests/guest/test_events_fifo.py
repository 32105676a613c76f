"""Event channels in the FIFO ABI, seen as a guest sees them: through the words in its memory."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.channels import ARRAY, CONTROL, LINK, LINKED, MASKED, OFFSET, PENDING, Channels
from tests.guest.rig import Guest, remove
from xsave.guest.xen.events import FIFO_DEFAULT_PRIORITY


@pytest.fixture
def channels(guest):
    return Channels(guest)


def test_the_first_control_block_switches_the_abi(channels):
    """After init_control a port shows in its word; before the array reaches it, it waits and is
    raised when the array comes (also what was pending at both levels before)."""
    before, later = channels.bind(2)
    events, info = channels.events, channels.info
    events.set_pending(before)
    info.evtchn_upcall_pending = 0
    assert events.init_control(channels.guest.frames[CONTROL], OFFSET, 0) == 0
    events.set_pending(later)
    assert not info.evtchn_upcall_pending
    assert not events.is_pending(later)
    assert events.unmask(later) == -errno.EINVAL
    assert events.expand_array(channels.guest.frames[ARRAY]) == 0
    assert info.evtchn_upcall_pending
    assert sorted(channels.consume()) == [before, later]


def test_the_array_grows_by_pages(channels):
    """Ports beyond the first page become reachable with the second; pages beyond what the ports
    need are refused; each page takes a writable reference."""
    channels.bind(1500)
    channels.fifo()
    channels.events.set_pending(1400)
    channels.events.set_pending(3)
    assert channels.consume() == [3]
    frames = channels.guest.frames
    count = channels.guest.tables.count
    held = count[frames[ARRAY + 1]]
    assert channels.events.expand_array(frames[ARRAY + 1]) == 0
    assert count[frames[ARRAY + 1]] == held + 1
    assert channels.consume() == [1400]
    for page in (2, 3):
        assert channels.events.expand_array(frames[ARRAY + page]) == 0
    assert channels.events.expand_array(frames[ARRAY + 4]) == -errno.ENOSPC


@pytest.mark.parametrize(
    ("page", "offset", "vcpu"),
    [(CONTROL, 4, 0), (CONTROL, 4096, 0), (CONTROL, 4096 - 64, 0), (CONTROL, 0, 1), (17, 0, 0)],
)
def test_a_bad_control_block_is_refused(channels, page, offset, vcpu):
    """Misaligned, across the page's end, of no vCPU, or in a page table: refused, and the domain
    stays with two levels. So is an array before any control block, and a second one."""
    events, frames = channels.events, channels.guest.frames
    assert events.expand_array(frames[ARRAY]) == -errno.EINVAL
    assert events.init_control(frames[page], offset, vcpu) == -errno.EINVAL
    (port,) = channels.bind()
    events.set_pending(port)
    assert channels.shared.evtchn_pending[0] == 1 << port
    channels.fifo()
    assert events.init_control(frames[CONTROL], 0, 0) == -errno.EINVAL


def test_no_frame_of_another_is_taken(channels):
    """Control blocks and array pages must be the guest's own ordinary frames."""
    foreign = int(channels.guest.machine.allocate(2, 1)[0])
    guest = channels.guest
    for mfn in (foreign, guest.l1, guest.l4, guest.domain.scratch_mfn, 1, 1 << 60):
        assert channels.events.init_control(mfn, 0, 0) == -errno.EINVAL
    channels.fifo()
    for mfn in (foreign, guest.l1, guest.l4, guest.domain.scratch_mfn, 1, 1 << 60):
        assert channels.events.expand_array(mfn) == -errno.EINVAL


def test_events_queue_in_order_and_by_priority(channels):
    """Ports of one priority come in the order they were raised, each once; the lowest priority
    number comes first."""
    ports = channels.bind(6)
    channels.fifo()
    channels.events.ports[ports[4]].priority = 2
    for port in (3, 1, 5, 2, 1, 3):
        channels.events.set_pending(port)
    assert channels.control(0) == 1 << FIFO_DEFAULT_PRIORITY | 1 << 2
    assert channels.consume() == [5, 3, 1, 2]
    assert channels.consume() == []


def test_a_port_that_is_its_own_tail(channels):
    """A port raised again after the guest took it off the queue, while it is still the queue's
    tail for Xen, is queued anew: not behind itself, where every later event would be lost."""
    first, second = channels.bind(2)
    channels.fifo()
    for _ in range(3):
        channels.events.set_pending(first)
        assert channels.word(first) & LINK == 0
        assert channels.consume() == [first]
    channels.events.set_pending(first)
    channels.events.set_pending(second)
    assert channels.word(first) & LINK == second
    assert channels.consume() == [first, second]


def test_a_masked_fifo_port_is_linked_by_unmasking(channels):
    """Masked, a port is pending and in no queue; unmasking puts it there."""
    (port,) = channels.bind()
    channels.fifo()
    channels.word(port, MASKED)
    channels.events.set_pending(port)
    assert channels.word(port) == PENDING | MASKED
    assert channels.events.is_pending(port)
    assert not channels.info.evtchn_upcall_pending
    assert channels.events.unmask(port) == 0
    assert channels.word(port) == PENDING | LINKED
    assert channels.consume() == [port]
    assert channels.events.unmask(port) == 0
    assert channels.consume() == []


def test_a_closed_fifo_port_is_forgotten(channels):
    """Closing clears PENDING, so that a queue that still holds the port brings no event."""
    first, second = channels.bind(2)
    channels.fifo()
    channels.events.set_pending(first)
    channels.events.set_pending(second)
    assert channels.events.close(first) == 0
    assert channels.consume() == [second]


def test_reset_goes_back_to_two_levels(channels):
    """EVTCHNOP_reset closes all ports, gives every frame back and returns to two levels."""
    frames, tables = channels.guest.frames, channels.guest.tables
    held = list(tables.count)
    channels.bind(5)
    channels.fifo()
    channels.events.reset()
    assert not channels.events.ports
    assert list(tables.count) == held
    assert channels.events.expand_array(frames[ARRAY]) == -errno.EINVAL
    (port,) = channels.bind()
    channels.events.set_pending(port)
    assert channels.shared.evtchn_pending[0] == 1 << port


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["raise", "mask", "unmask", "consume"]), st.integers(1, 8)),
        max_size=40,
    ),
    st.lists(st.sampled_from([0, 7, 15]), min_size=8, max_size=8),
)
def test_no_event_is_lost(module_machine, steps, priorities):
    """Whatever is raised, masked, unmasked and handled in whatever order: every port that was
    raised and is unmasked in the end is handled, no other is, and no queue has a loop."""
    guest = Guest(module_machine)
    try:
        channels = Channels(guest)
        channels.bind(8)
        channels.fifo()
        for port, priority in enumerate(priorities, 1):
            channels.events.ports[port].priority = priority
        waiting, masked = set(), set()
        for what, port in steps:
            if what == "raise":
                channels.events.set_pending(port)
                waiting.add(port)
            elif what == "mask":
                channels.word(port, channels.word(port) | MASKED)
                masked.add(port)
            elif what == "unmask":
                channels.events.unmask(port)
                masked.discard(port)
            else:
                upcall = channels.info.evtchn_upcall_pending
                handled = channels.consume()
                assert len(handled) == len(set(handled))
                assert set(handled) == waiting - masked
                assert upcall or not handled
                waiting -= set(handled)
        assert set(channels.consume()) == waiting - masked
    finally:
        remove(guest.domain)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, (1 << 32) - 1)), max_size=20))
def test_a_guest_that_writes_nonsense(module_machine, writes):
    """Whatever the guest writes into its words and its control block, raising, masking, closing
    and polling events touch nothing but those pages."""
    guest = Guest(module_machine)
    try:
        channels = Channels(guest)
        ports = channels.bind(6)
        channels.fifo()
        others = [mfn for i, mfn in enumerate(guest.frames) if i not in (CONTROL, ARRAY)]
        before = guest.machine.pages[others].tobytes()
        for port, value in writes:
            channels.word(port, value)
            channels.control(port, value)
            for each in ports:
                channels.events.set_pending(each)
                channels.events.unmask(each)
                channels.events.is_pending(each)
        channels.events.close(ports[0])
        assert guest.machine.pages[others].tobytes() == before
    finally:
        remove(guest.domain)
