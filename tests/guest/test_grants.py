"""Grant tables: what the hypercalls answer, and what the backend may map."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.guest.calling import ARGS, FAULT, OUT, REFUSED, UNKNOWN, call
from tests.guest.frontend import FIRST_REF, READONLY, Frontend
from xsave.guest.xen import grants
from xsave.guest.xen.pagetypes import PGT_L1, PGT_WRITABLE

GNTTAB, MEMORY = 20, 12
MAP, SETUP, QUERY, SET_VERSION, GET_VERSION = 0, 2, 6, 8, 10
SELF, OTHER = 0x7FF0, 9
READING, WRITING = 8, 16

pytestmark = pytest.mark.usefixtures("asking")


def ask(guest, command, layout="", *values, count=1):
    guest.poke(ARGS, 0, struct.pack("<" + layout, *values))
    return call(guest, GNTTAB, command, guest.va(ARGS), count)


def answer(guest, layout, offset):
    return struct.unpack("<" + layout, guest.peek(ARGS, offset, struct.calcsize("<" + layout)))


def setup(guest, nr, domid=SELF, to=None):
    """setup_table; return its status."""
    to = guest.va(OUT) if to is None else to
    assert ask(guest, SETUP, "HxxIhxxxxxxQ", domid, nr, 77, to) == 0
    return answer(guest, "h", 8)[0]


def test_setup_gives_frames(guest):
    """The frames are the domain's, may be mapped writable, are given again when asked again, and
    are no part of its memory."""
    before = guest.domain.nr_pages()
    assert setup(guest, 2) == 0
    frames = struct.unpack("<2Q", guest.peek(OUT, 0, 16))
    assert setup(guest, 3) == 0
    assert struct.unpack("<3Q", guest.peek(OUT, 0, 24))[:2] == frames
    assert list(guest.domain.grants.frames[:2]) == list(frames)
    assert guest.domain.nr_pages() == before
    for mfn in frames:
        assert guest.tables.get_type(mfn, PGT_WRITABLE) == 0
        guest.tables.put_type(mfn)
        assert guest.tables.get_type(mfn, PGT_L1) == REFUSED


def test_grant_frames_cannot_be_given_back(guest):
    """decrease_reservation leaves them where they are."""
    assert setup(guest, 1) == 0
    frame = guest.domain.grants.frames[0]
    guest.poke(OUT, 0, struct.pack("<Q", frame))
    guest.poke(ARGS, 0, struct.pack("<QQIIH", guest.va(OUT), 1, 0, 0, SELF))
    assert call(guest, MEMORY, 1, guest.va(ARGS)) == 0
    assert guest.domain.owns(frame)


def test_setup_refuses(guest):
    """Too many frames, another domain, an address that is none, a count that is not 1."""
    assert setup(guest, grants.MAX_GRANT_FRAMES + 1) == grants.GENERAL_ERROR
    assert setup(guest, 1, OTHER) == grants.BAD_DOMAIN
    assert setup(guest, 1, to=8) == grants.BAD_VIRT_ADDR
    assert ask(guest, SETUP, count=2) == REFUSED
    assert ask(guest, QUERY, count=0) == REFUSED
    assert ask(guest, SETUP, count=1 << 31) == REFUSED
    assert call(guest, GNTTAB, SETUP, 8, 1) == FAULT
    assert setup(guest, grants.MAX_GRANT_FRAMES) == 0


def test_a_full_machine_is_an_error_of_the_guest(guest):
    """Without free frames the table does not grow, and nothing is lost."""
    machine = guest.machine
    machine.allocate(OTHER, machine.free_frames() - 1)
    assert setup(guest, 2) == grants.GENERAL_ERROR
    assert setup(guest, 1) == 0
    machine.free_domain(OTHER)


def test_query_size(guest):
    """How many frames there are and may be."""
    assert ask(guest, QUERY, "HxxIIh", SELF, 7, 7, 7) == 0
    assert answer(guest, "IIh", 4) == (0, grants.MAX_GRANT_FRAMES, 0)
    assert setup(guest, 5) == 0
    assert ask(guest, QUERY, "HxxIIh", guest.domain.domid, 7, 7, 7) == 0
    assert answer(guest, "IIh", 4) == (5, grants.MAX_GRANT_FRAMES, 0)
    assert ask(guest, QUERY, "HxxIIh", OTHER, 7, 7, 7) == 0
    assert answer(guest, "IIh", 4) == (7, 7, grants.BAD_DOMAIN)


def test_versions(guest):
    """Version 1 it is; version 2 is unknown, as to a Xen without it; others are wrong."""
    assert ask(guest, GET_VERSION, "HxxI", SELF, 7) == 0
    assert answer(guest, "I", 4) == (1,)
    for version, rc in ((2, UNKNOWN), (1, 0), (3, REFUSED), (0, REFUSED)):
        assert ask(guest, SET_VERSION, "I", version) == rc
        assert answer(guest, "I", 0) == (1,)
    assert ask(guest, GET_VERSION, "HxxI", OTHER, 7) == -errno.ESRCH


@pytest.mark.parametrize("command", [MAP, 1, 3, 4, 5, 7, 9, 11, 12, 99])
def test_other_commands_are_unknown(guest, command):
    """Nobody maps, copies or transfers foreign frames here."""
    assert ask(guest, command) == UNKNOWN


# -- the backend's side ---


@pytest.fixture
def front(guest):
    """A guest that grants its pages."""
    return Frontend(guest)


def test_map_marks_and_unmap_clears(front):
    """The entry says who reads and who writes, until the last of them is gone."""
    table, ref = front.domain.grants, FIRST_REF
    reader = table.map(ref, readonly=True)
    assert front.entry(ref)[0] == 1 | READING
    writers = [table.map(ref, readonly=False) for _ in range(2)]
    assert front.entry(ref)[0] == 1 | READING | WRITING
    table.unmap(writers[0])
    assert front.entry(ref)[0] == 1 | READING | WRITING
    table.unmap(writers[1])
    assert front.entry(ref)[0] == 1 | READING
    table.unmap(reader)
    assert front.entry(ref)[0] == 1


def test_a_mapped_frame_stays_what_it_is(front):
    """While it is mapped writable it can become no page table, and mapped at all it cannot be
    given back; after that it can."""
    guest, table = front.guest, front.domain.grants
    (mfn,) = guest.unmap(9)
    grant = table.map(FIRST_REF + 9, readonly=False)
    assert guest.tables.get_type(mfn, PGT_L1) == REFUSED
    table.unmap(grant)
    assert guest.tables.get_type(mfn, PGT_L1) == 0
    guest.tables.put_type(mfn)
    grant = table.map(FIRST_REF + 9, readonly=True)
    guest.poke(OUT, 0, struct.pack("<Q", mfn))
    guest.poke(ARGS, 0, struct.pack("<QQIIH", guest.va(OUT), 1, 0, 0, SELF))
    assert call(guest, MEMORY, 1, guest.va(ARGS)) == 0
    table.unmap(grant)
    assert call(guest, MEMORY, 1, guest.va(ARGS)) == 1


@pytest.mark.parametrize(
    ("flags", "domid", "status"),
    [
        (0, 0, grants.GENERAL_ERROR),
        (2, 0, grants.GENERAL_ERROR),
        (3, 0, grants.GENERAL_ERROR),
        (1 | 0x100, 0, grants.GENERAL_ERROR),
        (1, 3, grants.GENERAL_ERROR),
        (1 | READONLY, 0, grants.GENERAL_ERROR),
    ],
)
def test_what_was_not_granted_is_not_mapped(front, flags, domid, status):
    """Wrong kinds of entries, other domains' grants, writing what may be read."""
    front.set_entry(FIRST_REF, flags, domid, front.guest.frames[0])
    assert front.domain.grants.map(FIRST_REF, readonly=False) == status
    assert front.entry(FIRST_REF)[0] == flags


def test_frames_that_cannot_be_granted(front, foreign):
    """Foreign frames, Xen's, those that are not there; a page table may only be read."""
    guest, table = front.guest, front.domain.grants
    for mfn in (foreign, front.domain.scratch_mfn, guest.machine.nr_frames, 0xFFFFFFFF, 0):
        front.set_entry(FIRST_REF, 1, 0, mfn)
        assert table.map(FIRST_REF, readonly=True) == grants.BAD_PAGE
    front.set_entry(FIRST_REF, 1, 0, guest.l1)
    assert table.map(FIRST_REF, readonly=False) == grants.GENERAL_ERROR
    grant = table.map(FIRST_REF, readonly=True)
    assert grant.mfn == guest.l1
    table.unmap(grant)
    for ref in (512, -1, 1 << 32):
        assert table.map(ref, readonly=True) == grants.BAD_GNTREF
