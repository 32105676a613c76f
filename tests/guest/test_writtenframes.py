"""What was written of a domain's frames is named, once, and nothing else, whether its chunk of
memory was ever touched before or not."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from tests.guest.rig import MIB
from xsave.errors import StorageError
from xsave.guest.xen import writtenframes
from xsave.guest.xen.machine import CHUNK_FRAMES
from xsave.guest.xen.writtenframes import WrittenFrames, owned_chunks, runs

DOMID, OTHER = 1, 2
NONE = np.empty(0, np.int64)


def started(machine):
    try:
        return closing(WrittenFrames(machine, DOMID))
    except StorageError:
        pytest.skip("this kernel cannot log writes by write protection")


@pytest.mark.parametrize("seed", range(6))
def test_what_was_written_is_named(machines, seed):
    """Against a set: frames of a domain that shares chunks with another, the machine's last ones
    among them, written before the log began and behind it, few or many, given and taken meanwhile,
    looked at with and without beginning anew."""
    rng = np.random.default_rng(seed)
    machine = machines.make(24 * MIB + 100, seed=seed)
    mine, others = (machine.allocate(domid, 10 * MIB).astype(np.int64) for domid in (DOMID, OTHER))
    early = rng.choice(mine, 40)
    machine.mem[early, 5] = 1
    with started(machine) as log:
        due, anew, came = set(), set(), NONE
        for count in (0, 3, 3, 500, 1, 0, 60, 2):
            some = rng.choice(np.concatenate((mine, others)), count)
            machine.mem[some, 7] += 1
            due |= set(some.tolist()) & set(mine.tolist())
            found = log.written(came, clear=False)
            assert np.unique(found).size == found.size
            # Frames that have come anew are dirty in any case.
            assert due <= set(found.tolist()) <= due | anew
            if rng.random() < 0.7:
                assert np.array_equal(log.written(came, clear=True), found)
                due = set()
            more = machine.allocate(DOMID, 30).astype(np.int64)
            mine, anew = np.append(mine, more), anew | set(more.tolist())
            machine.free(mine[:20])
            came = np.concatenate((more, mine[:20]))
            mine, due = mine[20:], due - set(mine[:20].tolist())


def test_what_was_never_touched_is_not_protected(machine, monkeypatch):
    """A scan is spared what nobody has touched, and is not when that was touched."""
    mfns = machine.allocate(DOMID, 12 * MIB).astype(np.int64)
    chunks = np.unique(mfns // CHUNK_FRAMES)
    scanned = []
    with started(machine) as log:
        real = log._protection.written

        def written(of, **how):
            scanned.append(sum(nr for _, nr in of))
            return real(of, **how)

        monkeypatch.setattr(log._protection, "written", written)
        for nr, chunk in enumerate(chunks[:4]):
            assert log.written(NONE, clear=True).size == (nr > 0)
            assert not log.written(NONE, clear=True).size
            assert scanned[-1] == nr * CHUNK_FRAMES
            machine.mem[mfns[mfns // CHUNK_FRAMES == chunk][3], 0] = 1


@pytest.mark.parametrize("step", ["protect", "resident"])
def test_a_write_between_is_not_lost(machine, monkeypatch, step):
    """While a chunk that was touched is found, another of its pages is written: then or the next
    time that is named."""
    mfns = np.sort(machine.allocate(DOMID, CHUNK_FRAMES).astype(np.int64))
    with started(machine) as log:
        machine.mem[mfns[5], 0] = 1
        owner = log._protection if step == "protect" else machine
        real = getattr(owner, step)

        def meanwhile(*arguments):
            machine.mem[mfns[9], 0] += 1
            return real(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(owner, step, meanwhile)
            found = log.written(NONE, clear=True).tolist()
        assert mfns[5] in found
        assert mfns[9] in found + log.written(NONE, clear=True).tolist()
        assert not log.written(NONE, clear=True).size


def test_the_last_chunk_may_be_a_part_of_one(machines):
    """The frames that it has not are nobody's."""
    machine = machines.make(16 * MIB + 100)
    machine.allocate(DOMID, machine.free_frames())
    with started(machine) as log:
        machine.mem[-1, 0] = 1
        assert log.written(NONE, clear=False).tolist() == [machine.nr_frames - 1]
        assert log.written(NONE, clear=True).tolist() == [machine.nr_frames - 1]
        assert not log.written(NONE, clear=True).size


def test_it_may_not_be_possible(machine, monkeypatch):
    """A machine's file that cannot be asked is an error, and nothing stays protected or open."""
    monkeypatch.setattr(writtenframes.os, "open", _refuse)
    with pytest.raises(StorageError, match="cannot be logged"):
        WrittenFrames(machine, DOMID)


def _refuse(*_):
    raise PermissionError(13, "Permission denied")


def test_runs_of_chunks_hold_all_frames_of_the_domain(machine):
    """Whole chunks, ascending, none twice, none without a frame of the domain."""
    mfns = machine.allocate(DOMID, 3 * MIB + 7)
    covered = np.zeros(machine.nr_frames, int)
    for first, nr in runs(owned_chunks(machine, DOMID), machine.nr_frames):
        covered[first : first + nr] += 1
        assert (machine.owner[first : first + nr] == DOMID).any()
    assert (covered[mfns.astype(np.int64)] == 1).all()
    assert covered.max() == 1
