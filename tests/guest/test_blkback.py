"""The block backend without a Linux: a frontend that behaves, and frontends that do not."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.guest.frontend import (
    BARRIER,
    CLOSED,
    CLOSING,
    CONNECTED,
    DISCARD,
    ERROR,
    FIRST_REF,
    FLUSH,
    INDIRECT,
    INIT_WAIT,
    INITIALISED,
    INITIALISING,
    OKAY,
    READ,
    READONLY,
    RING,
    UNSUPPORTED,
    WRITE,
    Frontend,
    MemoryDisk,
    seg,
)
from tests.guest.rig import MIB, Guest, Machines, remove
from xsave.guest.xen.events import Port

DATA, OTHER = 6, 7


@pytest.fixture
def front(guest):
    """A connected frontend."""
    front = Frontend(guest)
    assert front.connect() == CONNECTED
    return front


def test_the_nodes_of_a_device(guest):
    """What libxl writes before the guest looks, and what the backend says when it has."""
    front = Frontend(guest, MemoryDisk(64, readonly=True))
    home = "/local/domain/1/device/vbd/51712"
    store = front.domain.store
    read = {node: store.read(f"{home}/{node}") for node in store.ls(home)}
    assert read == {
        "backend": b"/local/domain/0/backend/vbd/1/51712", "backend-id": b"0", "state": b"1",
        "virtual-device": b"51712", "device-type": b"disk",
    }  # fmt: skip
    assert (front.backend("frontend"), front.backend("frontend-id")) == (home, "1")
    assert (front.backend("mode"), front.backend("dev")) == ("r", "xvda")
    assert front.backend_state == INIT_WAIT
    assert front.connect() == CONNECTED
    assert (front.backend("sectors"), front.backend("sector-size")) == ("64", "512")
    assert front.backend("info") == "4"


@pytest.mark.parametrize("persistent", [0, 1])
def test_reads_and_writes(guest, persistent):
    """What is written is on the disk, what is read is in the page, and no byte beside it."""
    front = Frontend(guest)
    front.connect(persistent=persistent)
    guest.poke(DATA, 0, bytes(range(256)) * 16)
    assert front.ask(WRITE, 3, seg(DATA, 1, 2), seg(DATA, 7, 7)) == OKAY
    whole = bytes(range(256)) * 2
    assert front.disk.data == bytes(3 * 512) + whole * 3 + bytes((64 - 6) * 512)
    guest.poke(OTHER, 0, b"\xee" * 4096)
    assert front.ask(READ, 2, seg(OTHER, 2, 4)) == OKAY
    expected = b"\xee" * 1024 + bytes(512) + whole * 2 + b"\xee" * (4096 - 1024 - 1536)
    assert guest.peek(OTHER, 0, 4096) == expected
    assert (front.nr_forgotten == 0) == bool(persistent)


def test_flush_is_a_flush(front):
    """It reaches the disk, without data and with."""
    assert front.ask(FLUSH, 0) == OKAY
    assert front.disk.nr_flushes == 1
    front.guest.poke(DATA, 0, b"x" * 512)
    assert front.ask(FLUSH, 9, seg(DATA, 0, 0)) == OKAY
    assert front.disk.data[9 * 512 : 10 * 512] == b"x" * 512
    assert front.disk.nr_flushes == 3


def test_more_requests_than_slots(front):
    """The ring goes round; each request is answered once, with its own number."""
    for i in range(100):
        front.guest.poke(DATA, 0, bytes([i]) * 512)
        assert front.ask(WRITE, i % 64, seg(DATA, 0, 0)) == OKAY
    assert front.responded() == 100
    assert front.disk.data[35 * 512] == 99


def test_the_guest_is_told_when_it_wants_to_be(front):
    """An event follows the response the guest waits for, and none before."""
    events = front.domain.events
    front.ask(FLUSH, 0)
    assert events.is_pending(front.port)
    events._clear(front.port)
    front.guest.poke(RING, 12, struct.pack("<I", 4))
    front.ask(FLUSH, 0)
    front.ask(FLUSH, 0)
    assert not events.is_pending(front.port)
    front.ask(FLUSH, 0)
    assert events.is_pending(front.port)
    assert struct.unpack("<I", front.guest.peek(RING, 4, 4)) == (5,)


@pytest.mark.parametrize(
    ("op", "sector", "segments", "nr", "status"),
    [
        (READ, 0, [], None, ERROR),
        (WRITE, 0, [], None, ERROR),
        (READ, 0, [seg(DATA)] * 11, 12, ERROR),
        (READ, 0, [seg(DATA)] * 11, 255, ERROR),
        (READ, 0, [seg(DATA, 0, 8)], None, ERROR),
        (READ, 0, [seg(DATA, 5, 4)], None, ERROR),
        (READ, 0, [seg(DATA, 0, 255)], None, ERROR),
        (READ, 57, [seg(DATA)], None, ERROR),
        (READ, 64, [seg(DATA, 0, 0)], None, ERROR),
        (WRITE, (1 << 64) - 1, [seg(DATA, 0, 0)], None, ERROR),
        (READ, 0, [(511, 0, 0)], None, ERROR),
        (READ, 0, [seg(DATA), (1 << 31, 0, 0)], None, ERROR),
        (77, 0, [seg(DATA)], None, ERROR),
        (BARRIER, 0, [seg(DATA)], None, UNSUPPORTED),
        (DISCARD, 0, [], None, UNSUPPORTED),
        (INDIRECT, 0, [seg(DATA)], None, UNSUPPORTED),
    ],
)
def test_wrong_requests_are_answered(front, op, sector, segments, nr, status):
    """Each gets its error without the disk being asked, changes nothing, keeps nothing mapped,
    and the next one works."""
    before = front.guest.peek(DATA, 0, 4096)
    assert front.ask(op, sector, *segments, nr=nr) == status
    assert front.guest.peek(DATA, 0, 4096) == before
    assert front.disk.nr_asked == 0
    assert front.entry(FIRST_REF + DATA)[0] == 1
    assert front.ask(READ, 56, seg(DATA)) == OKAY


def test_a_read_only_disk(guest):
    """Writes are refused, reads are not."""
    front = Frontend(guest, MemoryDisk(readonly=True))
    front.connect()
    assert front.ask(WRITE, 0, seg(DATA)) == ERROR
    assert front.ask(READ, 0, seg(DATA)) == OKAY


@pytest.mark.parametrize("persistent", [0, 1])
def test_what_is_granted_for_reading_is_not_written(guest, persistent):
    """The disk can be written from it, and not read to it."""
    front = Frontend(guest)
    front.connect(persistent=persistent)
    front.grant(DATA, 1 | READONLY)
    assert front.ask(READ, 0, seg(DATA)) == ERROR
    assert front.ask(WRITE, 0, seg(DATA)) == OKAY


def test_a_broken_disk_is_an_error_response(front):
    """The guest hears of it; nothing stays mapped."""
    front.disk.broken = True
    for op in (READ, WRITE):
        assert front.ask(op, 0, seg(DATA)) == ERROR
    assert front.ask(FLUSH, 0) == ERROR
    assert front.entry(FIRST_REF + DATA)[0] == 1


def test_persistent_grants_stay_until_the_end(guest):
    """They are mapped once, and let go of when the frontend closes."""
    front = Frontend(guest)
    front.connect(persistent=1)
    for _ in range(3):
        assert front.ask(READ, 0, seg(DATA)) == OKAY
    assert front.entry(FIRST_REF + DATA)[0] == 1 | 8 | 16
    front.write("state", CLOSING)
    assert front.backend_state == CLOSING
    assert front.entry(FIRST_REF + DATA)[0] == 1
    assert front.entry(FIRST_REF + RING)[0] == 1


def test_a_frontend_comes_again(front):
    """Closed, it may connect anew, with another ring and port."""
    front.write("state", CLOSING)
    front.write("state", CLOSED)
    assert front.backend_state == CLOSED
    front.domain.events.close(front.port)
    front.write("state", INITIALISING)
    assert front.backend_state == INIT_WAIT
    assert front.connect() == CONNECTED
    assert front.ask(READ, 0, seg(DATA)) == OKAY


def test_closing_waits_for_what_is_in_flight(guest):
    """Frames stay mapped until the disk is done with them; then the backend closes, and goes on
    from the state in which the frontend is by then."""
    front = Frontend(guest, slow=True)
    front.connect()
    front.put(READ, 0, seg(DATA))
    front.notify()
    assert front.device.nr_in_flight == 1
    front.write("state", CLOSING)
    front.write("state", CLOSED)
    assert front.backend_state == CONNECTED
    assert front.entry(FIRST_REF + DATA)[0] != 1
    front.finish()
    assert front.backend_state == CLOSED
    assert front.responded() == 0
    assert [front.entry(FIRST_REF + page)[0] for page in (DATA, RING)] == [1, 1]


@pytest.mark.parametrize(
    "nodes",
    [
        {"ring_ref": 511},
        {"ring_ref": "nonsense"},
        {"ring_ref": ""},
        {"ring_ref": 1 << 40},
        {"event_channel": 3000},
        {"event_channel": "-1"},
        {"event_channel": 0},
        {"protocol": "x86_32-abi"},
        {"protocol": "\xff" * 300},
    ],
)
def test_wrong_offers_are_refused(guest, nodes):
    """The backend closes and says why; no frame or port is kept."""
    front = Frontend(guest)
    assert front.connect(**nodes) == CLOSING
    assert front.domain.store.ls("/local/domain/0/error/backend/vbd/1/51712") == ["error"]
    assert front.entry(FIRST_REF + RING)[0] == 1
    assert front.domain.events.ports[front.port].kind == "unbound"


def test_a_port_of_another_kind_is_refused(guest):
    """Only a port that waits for domain 0 is taken."""
    front = Frontend(guest)
    ports = [
        front.domain.events.bind_virq(1, 0),
        front.domain.events.bind(Port("ipi")),
        front.domain.events.bind(Port("unbound", remote_domid=5)),
    ]
    for port in ports:
        assert front.connect(event_channel=port) == CLOSING
        front.write("state", CLOSED)
        front.write("state", INITIALISING)


def test_a_closed_port_is_not_raised(guest):
    """A port that the guest closed, whose number is another's by now, gets no event."""
    front = Frontend(guest, slow=True)
    front.connect()
    front.put(READ, 0, seg(DATA))
    front.notify()
    events = front.domain.events
    events.close(front.port)
    assert events.bind_virq(2, 0) == front.port
    front.finish()
    assert not events.is_pending(front.port)


@pytest.mark.parametrize("produced", [33, 1 << 31, 0xFFFFFFFF])
def test_impossible_indices_are_the_end_of_the_ring(front, produced):
    """The device closes; it is the guest's own loss."""
    front.guest.poke(RING, 0, struct.pack("<I", produced))
    front.notify()
    assert front.backend_state == CLOSING
    assert front.entry(FIRST_REF + RING)[0] == 1


# -- frontends that mean harm ---

requests = st.builds(
    lambda op, nr, number, sector, segments: struct.pack(
        "<BBHxxxxQQ", op, nr, 0, number, sector
    )
    + b"".join(struct.pack("<IBBxx", *s) for s in segments),
    st.integers(0, 7) | st.integers(0, 255),
    st.integers(0, 12) | st.integers(0, 255),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 70) | st.integers(0, (1 << 64) - 1),
    st.lists(
        st.tuples(
            st.integers(0, 30) | st.integers(0, (1 << 32) - 1),
            st.integers(0, 9) | st.integers(0, 255),
            st.integers(0, 9) | st.integers(0, 255),
        ),
        max_size=11,
    ),
)  # fmt: skip
entries = st.tuples(
    st.integers(0, 23),
    st.sampled_from([0, 1, 1, 1, 1 | READONLY, 2, 3]) | st.integers(0, 0xFFFF),
    st.sampled_from([0, 0, 0, 1, 5]),
    st.integers(0, 25),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("request"), requests),
        st.tuples(st.just("ring"), st.integers(0, 4000), st.binary(max_size=90)),
        st.tuples(st.just("entry"), entries),
        st.tuples(st.just("state"), st.integers(0, 9) | st.text("0123 x", max_size=3)),
        st.tuples(st.just("offer"), st.integers(0, 30), st.integers(0, 9)),
        st.tuples(st.just("finish")),
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def arena():
    """A machine and a victim on it."""
    machines = Machines()
    machine = machines.make(16 * MIB)
    victim = Guest(machine, domid=2)
    for page in range(victim.nr):
        victim.poke(page, 0, bytes([page + 1]) * 4096)
    yield machine, victim
    machines.close()


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=steps, slow=st.booleans(), persistent=st.integers(0, 1))
def test_whatever_a_frontend_does(arena, steps, slow, persistent):
    """Nothing raises, the victim's frames stay as they are, and when the frontend is closed no
    frame of the guest's is held any more than before."""
    machine, victim = arena
    before = machine.pages[victim.frames].tobytes()
    guest = Guest(machine)
    try:
        front = Frontend(guest, slow=slow)
        counts = held(machine)
        front.connect(persistent=persistent)
        frames = [*guest.frames, victim.frames[3], 0, 1, front.domain.scratch_mfn, 1 << 31]
        for step in steps:
            misbehave(front, step, frames)
        front.finish()
        for state in (CLOSING, CLOSED):
            front.write("state", state)
        assert held(machine) == counts
        assert machine.pages[victim.frames].tobytes() == before
    finally:
        remove(guest.domain)


def held(machine):
    return machine.refs.tobytes(), machine.type_count.tobytes()


def misbehave(front, step, frames):
    """Do one of the things that a guest can do."""
    match step:
        case ("request", raw):
            front.guest.poke(RING, 64 + front.produced % 32 * 112, raw)
            front.produced += 1
            front.guest.poke(RING, 0, struct.pack("<I", front.produced & 0xFFFFFFFF))
            front.domain.events.send(front.port)
        case ("ring", offset, data):
            front.guest.poke(RING, offset, data)
            front.domain.events.send(front.port)
        case ("entry", (ref, flags, domid, frame)):
            front.set_entry(ref, flags, domid, frames[frame % len(frames)])
        case ("state", state):
            front.write("state", state)
        case ("offer", ref, port):
            front.write("ring-ref", ref)
            front.write("event-channel", port)
            front.write("state", INITIALISED)
        case ("finish",):
            front.finish()


def test_harm_is_possible_in_principle(arena):
    """The checks above would see a frame that is held, or a victim that is changed."""
    machine, victim = arena
    counts, before = held(machine), machine.pages[victim.frames].tobytes()
    machine.refs[victim.frames[0]] += np.uint32(1)
    assert held(machine) != counts
    machine.refs[victim.frames[0]] -= np.uint32(1)
    victim.poke(3, 9, b"!")
    assert machine.pages[victim.frames].tobytes() != before
    victim.poke(3, 9, bytes([4]))
