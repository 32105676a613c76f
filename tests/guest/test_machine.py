"""Machine memory: who owns a frame, what is in a fresh one, which were ever touched."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.rig import FULL, MIB
from xsave.errors import OutOfFrames, StorageError
from xsave.frames import INVALID_M2P_ENTRY, PAGE_SIZE
from xsave.guest.xen import machine as xen_machine
from xsave.guest.xen import residency
from xsave.guest.xen.machine import (
    CHUNK_FRAMES,
    DOMID_FREE,
    DOMID_XEN,
    M2P_FIRST_FRAME,
    M2P_L2_FRAME,
    M2P_L3_FRAME,
    Machine,
    first_domain_frame,
)


@pytest.fixture
def small(machines):
    """A machine of 16 MiB: 4 chunks of frames for domains' use less Xen's two."""
    return machines.make(16 * MIB)


# -- a new machine ---


@pytest.mark.parametrize("nr_frames", [8 * MIB, 9 * MIB + 3, 64 * MIB, 2048 * MIB])
def test_a_new_machine_is_empty(machines, nr_frames):
    """Xen owns the frames below the first, all others are free and have no pfn; memory and m2p
    are views of the same bytes."""
    machine = machines.make(nr_frames)
    first = machine.first_frame
    assert machine.nr_frames == nr_frames
    assert first == first_domain_frame(nr_frames)
    assert (machine.owner[:first] == DOMID_XEN).all()
    assert (machine.owner[first:] == DOMID_FREE).all()
    assert (machine.m2p == INVALID_M2P_ENTRY).all()
    assert machine.m2p.size == nr_frames
    machine.m2p[nr_frames - 1] = 0x1234
    at = M2P_FIRST_FRAME * 4096 + 8 * (nr_frames - 1)
    assert machine.map[at : at + 8] == (0x1234).to_bytes(8, "little")
    assert at + 8 <= first * PAGE_SIZE


def test_the_m2p_tables_map_the_m2p(machines):
    """Xen's L3 and L2 map the m2p with read-only 2 MiB pages, in order, and nothing else."""
    machine = machines.make(4096 * MIB)
    (slot,) = np.flatnonzero(machine.mem[M2P_L3_FRAME])
    assert slot == 0
    assert machine.mem[M2P_L3_FRAME, 0] >> np.uint64(12) == M2P_L2_FRAME
    entries = machine.mem[M2P_L2_FRAME]
    used = entries[entries != 0]
    assert (entries[: used.size] == used).all()
    assert (used >> np.uint64(12)).tolist() == list(
        range(M2P_FIRST_FRAME, machine.first_frame, CHUNK_FRAMES)
    )
    assert not (used & np.uint64(2)).any()
    assert used.size * CHUNK_FRAMES * 512 >= machine.nr_frames


@pytest.mark.parametrize("nr_frames", [0, 1, 8 * MIB - 1, (1 << 27) + 1])
def test_a_machine_of_impossible_size_is_refused(tmp_path, nr_frames):
    """A size out of bounds is a StorageError, and no file is made."""
    with pytest.raises(StorageError, match="expected 2048 to"):
        xen_machine.create_files(tmp_path, nr_frames, 1)
    assert not list(tmp_path.iterdir())


def test_a_machine_that_is_not_there_is_a_storage_error(tmp_path):
    """Mapping a machine without files is a StorageError, and so is making one twice."""
    with pytest.raises(StorageError, match="cannot map"):
        Machine(tmp_path, "none")
    xen_machine.create_files(tmp_path, 8 * MIB, 1)
    with pytest.raises(StorageError, match="cannot make"):
        xen_machine.create_files(tmp_path, 8 * MIB, 1)


# -- handing out ---


@settings(max_examples=25)
@given(
    seed=st.integers(0, (1 << 63) - 1),
    sizes=st.lists(st.integers(0, 500), min_size=1, max_size=6),  # of 3072 frames
    freed=st.sets(st.integers(1, 6)),
)
def test_allocations_are_disjoint(module_machine, seed, sizes, freed):
    """Whatever is handed out and given back, a frame has one owner, no domain gets a frame of
    Xen's, every frame is zero and has no pfn, and the free frames are the others."""
    machine = module_machine
    machine.header[:2] = seed, 0
    held = {}
    try:
        for domid, nr in enumerate(sizes, 1):
            mfns = machine.allocate(domid, nr)
            held[domid] = set(mfns.tolist())
            assert mfns.dtype == np.uint64
            assert len(held[domid]) == nr
            assert not machine.mem[mfns].any()
            assert (machine.m2p[mfns] == INVALID_M2P_ENTRY).all()
            machine.mem[mfns] = domid
            machine.m2p[mfns] = domid
            if domid in freed:
                machine.free(mfns)
                del held[domid]
        taken = [mfn for frames in held.values() for mfn in frames]
        assert len(set(taken)) == len(taken)
        assert all(mfn >= machine.first_frame for mfn in taken)
        assert machine.free_frames() == machine.nr_frames - machine.first_frame - len(taken)
        for domid, frames in held.items():
            assert set(np.flatnonzero(machine.owner == domid).tolist()) == frames
            assert (machine.mem[sorted(frames)] == domid).all()
    finally:
        for domid in range(1, len(sizes) + 1):
            machine.free_domain(domid)


def test_frames_are_shuffled(machines):
    """pfn order is not mfn order, neither over the chunks nor inside them."""
    machine = machines.make(64 * MIB)
    mfns = machine.allocate(1, 20 * CHUNK_FRAMES).astype(np.int64)
    assert not (np.diff(mfns) > 0).all()
    chunks = mfns[::CHUNK_FRAMES] // CHUNK_FRAMES
    assert (np.diff(chunks) < 0).any()
    for chunk in mfns.reshape(-1, CHUNK_FRAMES):
        assert len(set((chunk // CHUNK_FRAMES).tolist())) == 1
        assert np.count_nonzero(np.diff(chunk) == 1) < CHUNK_FRAMES // 8


def test_the_seed_decides(machines):
    """The same seed hands out the same frames, another seed and the next call others."""
    one, same, other = (machines.make(16 * MIB, seed) for seed in (5, 5, 6))
    first, second = one.allocate(1, 600), one.allocate(1, 600)
    assert (same.allocate(1, 600) == first).all()
    assert (same.allocate(1, 600) == second).all()
    assert (other.allocate(1, 600) != first).any()
    one.free_domain(1)
    assert (one.allocate(1, 600) != first).any()


def test_an_order_decides_whatever_the_host(machines):
    """Frames by a number: the same on hosts with other seeds and other pasts, others by another
    number; a negative or a huge one is one too."""
    one, other = machines.make(16 * MIB, 5), machines.make(16 * MIB, 6)
    other.allocate(2, 600)
    other.free_domain(2)
    for order in (7, -1, 1 << 70 | 3):
        first, second = one.allocate(1, 600, order), one.allocate(1, 600, order)
        assert (other.allocate(1, 600, order) == first).all()
        assert (other.allocate(1, 600, order) == second).all()
        one.free_domain(1)
        assert (one.allocate(1, 600, order + 1) != first).any()
        one.free_domain(1)
        other.free_domain(1)


def test_every_frame_can_be_had_and_no_more(small):
    """The last free frame is handed out; one more is OutOfFrames, and takes nothing."""
    nr = small.free_frames()
    with pytest.raises(OutOfFrames) as caught:
        small.allocate(1, nr + 1)
    assert caught.value.facts == {"wanted": nr + 1, "free": nr, "host": "small"}
    assert small.free_frames() == nr
    assert set(small.allocate(1, nr).tolist()) == set(range(small.first_frame, small.nr_frames))
    with pytest.raises(OutOfFrames):
        small.allocate(2, 1)
    assert small.allocate(2, 0).size == 0


def test_two_views_of_a_machine_agree(small):
    """Another process's mapping sees every allocation, type and byte at once."""
    other = Machine(small.directory, "other")
    mfns = small.allocate(3, 10)
    small.mem[mfns] = 7
    small.page_type[mfns] = 4
    assert (other.owner[mfns] == 3).all()
    assert (other.page_type[mfns] == 4).all()
    assert (other.pages[mfns, ::8] == 7).all()
    assert not set(other.allocate(4, 500).tolist()) & set(mfns.tolist())


# -- giving back ---


def test_freed_frames_are_scrubbed_and_forgotten(small):
    """A freed frame holds zeros without being touched, has no type, count, pin or pfn, and its
    neighbours keep all of theirs."""
    mfns = small.allocate(1, 1000)
    gone, kept = mfns[::2], mfns[1::2]
    columns = (small.page_type, small.pinned, small.type_count, small.refs, small.m2p)
    small.mem[mfns] = FULL
    for column in columns:
        column[mfns] = 1
    small.free(gone)
    assert not small.resident(gone).any()
    assert not small.mem[gone].any()
    for column in columns[:-1]:
        assert not column[gone].any()
    assert (small.m2p[gone] == INVALID_M2P_ENTRY).all()
    assert (small.owner[gone] == DOMID_FREE).all()
    assert (small.mem[kept] == FULL).all()
    assert all((column[kept] == 1).all() for column in columns)
    assert (small.owner[kept] == 1).all()


def test_free_domain_takes_all_of_one(small):
    """free_domain gives back one domain's frames, says how many, and nothing of another's."""
    small.allocate(1, 300)
    other = small.allocate(2, 300)
    assert small.free_domain(1) == 300
    assert small.free_domain(1) == 0
    assert not (small.owner == 1).any()
    assert (small.owner[other] == 2).all()
    small.free(np.empty(0, np.uint64))


# -- which frames were touched ---


def test_untouched_frames_are_known_without_touching_them(small):
    """resident() is true exactly for the frames that were written, and asking allocates none."""
    mfns = small.allocate(1, 900)
    before = (small.directory / "machine.mem").stat().st_blocks
    assert not small.resident(mfns).any()
    assert (small.directory / "machine.mem").stat().st_blocks == before
    touched = np.arange(900) % 7 == 3
    small.pages[mfns[touched], 4095] = 1
    assert (small.resident(mfns) == touched).all()
    assert (small.resident(mfns[::-1]) == touched[::-1]).all()
    assert small.resident(mfns[:0]).size == 0


def test_holes_and_mincore_agree(small, monkeypatch):
    """Asking for the holes of the file gives the same answer as asking what is in memory."""
    mfns = small.allocate(1, 1500)
    touched = np.random.default_rng(1).random(1500) < 0.3
    small.pages[mfns[touched], 0] = 1
    quick = small.resident(mfns)
    monkeypatch.setattr(residency, "_swap_in_use", lambda: True)
    assert (small.resident(mfns) == quick).all()
    assert (quick == touched).all()


def test_swap_that_begins_meanwhile_is_noticed(small, monkeypatch):
    """If swap comes into use while the kernel is asked, its answer is not believed."""
    mfns = small.allocate(1, 10)
    answers = iter([False, True])
    monkeypatch.setattr(residency, "_swap_in_use", lambda: next(answers))
    asked = []
    monkeypatch.setattr(
        residency, "_data_pages", lambda path, first, nr: asked.append(nr) or np.ones(nr, bool)
    )
    assert small.resident(mfns).all()
    assert asked


def test_pages_evicted_to_disk_are_touched():
    """A page that was written back to a disk and evicted from memory is not taken for a hole."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        xen_machine.create_files(directory, 8 * MIB, 1)
        fd = os.open(directory / "machine.mem", os.O_RDWR)
        os.pwrite(fd, b"x", 1500 * PAGE_SIZE)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        machine = Machine(directory, "on disk")
        assert machine.resident(np.array([1499, 1500])).tolist() == [False, True]


def test_an_unreadable_memory_counts_as_touched(small, monkeypatch):
    """Where the holes cannot be asked for, every frame may hold something."""
    monkeypatch.setattr(residency, "_swap_in_use", lambda: True)

    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(residency.os, "lseek", refuse)
    assert small.resident(small.allocate(1, 5)).all()
