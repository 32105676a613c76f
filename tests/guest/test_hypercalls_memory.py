"""memory_op: how much memory there is, and frames that come and go."""

from __future__ import annotations

import errno
import struct

import numpy as np
import pytest

from tests.guest.calling import ARGS, M2P, OUT, UNKNOWN, call
from tests.guest.rig import READ_ONLY
from xsave.frames import INVALID_M2P_ENTRY

pytestmark = pytest.mark.usefixtures("asking")


def test_memory_is_not_what_the_machine_has(guest):
    """The answers a guest keeps for ever are Xen's constants, not this machine's size."""
    assert call(guest, 12, 2) == 0x7_FFFF_FFFF
    assert call(guest, 12, 4) == guest.domain.max_pages
    assert call(guest, 12, 3) == guest.domain.nr_pages() == guest.nr + 4
    assert call(guest, 12, 12, guest.va(OUT)) == 0
    mapping = struct.unpack("<QQQ", guest.peek(OUT, 0, 24))
    assert mapping == (M2P, 0xFFFF_8040_0000_0000, 0x7_FFFF_FFFF)
    for command in (5, 13, 63):
        assert call(guest, 12, command, guest.va(OUT)) == UNKNOWN


def test_the_memory_map(guest):
    """One range of RAM, as large as the domain may be; no room for it is -ENOBUFS."""
    guest.poke(ARGS, 0, struct.pack("<IxxxxQ", 5, guest.va(OUT)))
    assert call(guest, 12, 9, guest.va(ARGS)) == 0
    assert struct.unpack("<QQI", guest.peek(OUT, 0, 20)) == (0, guest.domain.max_pages << 12, 1)
    assert guest.peek(ARGS, 0, 4) == struct.pack("<I", 1)
    guest.poke(ARGS, 0, struct.pack("<I", 0))
    assert call(guest, 12, 9, guest.va(ARGS)) == -errno.ENOBUFS


def reservation(guest, command, extents, *, order=0, nr=None, start=0):
    guest.poke(OUT, 0, struct.pack(f"<{len(extents)}Q", *extents))
    nr = len(extents) if nr is None else nr
    guest.poke(ARGS, 0, struct.pack("<QQIIHxxxxxx", guest.va(OUT), nr, order, 0, 0x7FF0))
    return call(guest, 12, command | start << 6, guest.va(ARGS))


def test_frames_are_given_back(guest):
    """decrease_reservation frees frames that nothing names, up to the first that is still mapped,
    a table, Xen's or another's; a repeated call goes on where it stopped."""
    given = guest.unmap(5, 6, 7)
    read_only = guest.frames[9]
    assert guest.tables.update_entry(guest.l1, 9, read_only << 12 | READ_ONLY) == 0
    for stop in (guest.frames[8], read_only, guest.l1, guest.domain.scratch_mfn, 1, 1 << 40):
        assert reservation(guest, 1, [given[0], stop, given[1]]) == 1
        assert guest.machine.owner[given[1]] == 1
        guest.machine.owner[given[0]] = 1
    assert reservation(guest, 1, [0, *given[1:]], start=1) == 3
    assert (guest.machine.owner[given[1:]] == 0x7FF4).all()
    assert reservation(guest, 1, [given[0], given[0]]) == 1
    guest.machine.owner[given[0]] = 1
    assert reservation(guest, 1, [given[0]], order=1) == 0
    assert reservation(guest, 1, [given[0]], start=2) == 2
    assert reservation(guest, 1, [given[0]], nr=1 << 17) == 0
    assert guest.machine.owner[given[0]] == 1


def test_frames_are_asked_for(guest):
    """populate_physmap puts fresh frames behind pfns, up to the domain's maximum, and tells which;
    the m2p knows them."""
    domain, machine = guest.domain, guest.machine
    domain.max_pages = domain.nr_pages() + 3
    assert reservation(guest, 6, [10, 20, 30], start=2) == 3
    assert guest.peek(OUT, 0, 16) == struct.pack("<QQ", 10, 20)
    assert machine.m2p[struct.unpack("<Q", guest.peek(OUT, 16, 8))[0]] == 30
    assert reservation(guest, 6, [100, 200, 300]) == 2
    mfns = np.array(struct.unpack("<2Q", guest.peek(OUT, 0, 16)))
    assert (machine.owner[mfns] == 1).all()
    assert machine.m2p[mfns].tolist() == [100, 200]
    assert guest.peek(OUT, 16, 8) == struct.pack("<Q", 300)
    assert reservation(guest, 6, [400]) == 0
    machine.allocate(3, machine.free_frames() - 1)
    domain.max_pages += 4
    assert reservation(guest, 6, [400, 500, 600]) == 1
    assert machine.m2p[struct.unpack("<Q", guest.peek(OUT, 0, 8))[0]] == 400
    assert guest.peek(OUT, 8, 8) == struct.pack("<Q", 500)
    assert reservation(guest, 6, [500]) == 0


def test_frames_without_a_place(guest):
    """increase_reservation gives frames that are no pfn's, and tells which if it is asked to."""
    domain, machine = guest.domain, guest.machine
    domain.max_pages = before = domain.nr_pages() + 3
    assert reservation(guest, 0, [0, 0], start=1) == 2
    (mfn,) = struct.unpack("<Q", guest.peek(OUT, 8, 8))
    assert machine.owner[mfn] == 1
    assert machine.m2p[mfn] == INVALID_M2P_ENTRY
    assert guest.peek(OUT, 0, 8) == bytes(8)
    assert reservation(guest, 0, [0, 0, 0]) == 2
    assert domain.nr_pages() == before
