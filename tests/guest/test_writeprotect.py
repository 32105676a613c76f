"""Write protection of a mapping of this process: every page that was written is found, no other,
however the scan is cut."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from xsave.errors import StorageError
from xsave.guest.xen import writeprotect
from xsave.guest.xen.writeprotect import WriteProtection

NR_PAGES = 6000
RUNS = [(10, 700), (800, 30), (2000, 1), (5000, 900)]


@pytest.fixture
def pages():
    """(n, 4096) u8: shared memory in a file, as a machine's is."""
    fd = os.memfd_create("pages")
    os.ftruncate(fd, NR_PAGES << 12)
    mapped = mmap.mmap(fd, NR_PAGES << 12)
    os.close(fd)
    return np.frombuffer(mapped, np.uint8).reshape(-1, 4096)


@pytest.fixture
def protection(pages):
    """Of all of it."""
    try:
        made = WriteProtection(pages.ctypes.data, NR_PAGES)
    except StorageError:
        pytest.skip("this kernel cannot log writes by write protection")
    with made:
        made.protect(RUNS)
        yield made


@pytest.mark.parametrize("large", [1, 1 << 30], ids=["in two halves", "at once"])
@pytest.mark.parametrize("gap", [0, 100, 1 << 30])
@pytest.mark.parametrize("most", [1, 7, 4096])
def test_what_was_written_is_found(pages, protection, monkeypatch, large, gap, most):
    """Pages that are there and pages that were not, again and again; what lies between the runs
    is nobody's business, and with clear nothing is found twice."""
    monkeypatch.setattr(writeprotect, "_LARGE_PAGES", large)
    monkeypatch.setattr(writeprotect, "_GAP_PAGES", gap)
    monkeypatch.setattr(writeprotect, "_MAX_REGIONS", most)
    rng = np.random.default_rng(most)
    inside = np.concatenate([np.arange(first, first + nr) for first, nr in RUNS])
    for count in (1, 300, 5, 1200):
        some = np.unique(rng.integers(0, NR_PAGES, count))
        pages[some, 0] += 1
        expected = np.intersect1d(some, inside)
        assert np.array_equal(protection.written(RUNS, clear=False), expected)
        assert np.array_equal(protection.written(RUNS, clear=True), expected)
        assert not protection.written(RUNS, clear=False).size
        # Nor did what lies between get a protection: to scan it would cost as much as the runs.
        assert protection.written([(710, 90)], clear=False).size == 90
    assert not protection.written([], clear=True).size
