"""A frame number is found wherever it is, and nothing else is taken for one."""

from __future__ import annotations

import numpy as np
import pytest

from xsave.torture import forks
from xsave.torture.laboratory import A_FIRST, MEMORY_PAGES, RANGE
from xsave.torture.stale import live, mfns_in, register_at
from xsave.torture.tasks import Tasks

MFN = A_FIRST + 77


@pytest.mark.parametrize(
    "word", [A_FIRST, MFN, A_FIRST + RANGE - 1, MFN << 12, MFN << 12 | 0xFFF, MFN << 12 | 0x67,
             1 << 63 | MFN << 12 | 0x67],
)  # fmt: skip
def test_a_frame_number(word):
    """Plain, as a machine address, as an entry with flags."""
    words = np.array([5, word, 0], np.uint64)
    assert mfns_in(words, A_FIRST, RANGE).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "word", [0, A_FIRST - 1, A_FIRST + RANGE, (A_FIRST - 1) << 12 | 0xFFF, (A_FIRST + RANGE) << 12,
             0xFFFF880000000000, (1 << 64) - 1, MFN << 11],
)  # fmt: skip
def test_no_frame_number(word):
    """One beside the range, a kernel address, all ones."""
    assert not mfns_in(np.array([word], np.uint64), A_FIRST, RANGE).any()


def test_no_canonical_entry_is_one():
    """No entry an image can hold, with any flags a kernel sets, looks like a frame number."""
    pfns = np.arange(MEMORY_PAGES, dtype=np.uint64)[:, None] << np.uint64(12)
    flags = np.arange(0x200, dtype=np.uint64)[None, :]
    assert not mfns_in(pfns | flags, A_FIRST, RANGE).any()


def planted(lab, plant):
    """Suspend the guest, plant something, and return what is stale in its image."""

    def plant_and_save():
        lab.request_suspend()
        assert lab.run_to_suspend()
        plant()
        return lab.stale(lab.image())

    return forks.in_child(plant_and_save)


def test_an_undisturbed_image_is_clean(lab):
    """Nothing is planted, nothing is found."""
    assert planted(lab, lambda: None) == []


def test_a_page(lab):
    """In a page of no particular use: found, with its pfn."""

    def plant():
        pfn = MEMORY_PAGES - 1
        (mfn,) = np.flatnonzero((lab.a.m2p == pfn) & (lab.a.owner == 1))
        lab.a.mem[mfn, 3] = MFN << 12 | 0x67

    (found,) = planted(lab, plant)
    assert (found.kind, found.pfn, found.value) == ("page", MEMORY_PAGES - 1, MFN << 12 | 0x67)
    assert live([found]) == [found]


@pytest.mark.parametrize(("offset", "kind"), [(8, "stack"), (-64, "dead")])
def test_a_stack(lab, offset, kind):
    """Above a thread's stack pointer it counts, with the thread's name; below it is told only."""

    def plant():
        hv = lab.door.xen
        task = next(t for t in Tasks(hv, lab.symbols).tasks if t.comm == "ticker")
        hv.write(task.sp + offset, MFN.to_bytes(8, "little"))

    (found,) = planted(lab, plant)
    assert found.kind == kind
    assert found.where.startswith("ticker: ")
    assert bool(live([found])) is (kind == "stack")


def test_a_register(lab):
    """In a register of a vCPU: named."""

    def plant():
        from xsave.guest.xen.cpuregs import R13

        lab.door.xen.q[R13] = MFN

    (found,) = planted(lab, plant)
    assert (found.kind, found.where) == ("register", "vCPU 0: r13")


def test_names_of_registers():
    """Offsets of vcpu_guest_context, as Xen's header has them."""
    assert [register_at(at) for at in (0x208, 0x268, 0x2A0)] == ["r15", "rdx", "rsp"]
    assert register_at(0x1378) == "context+0x1378"
