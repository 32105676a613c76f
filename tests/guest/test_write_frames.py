"""write_frames: pages reach the frames they are for, whatever the order, and no others."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.flows.flow import MIB
from xsave.errors import StorageError
from xsave.guest.xen import machine as xen_machine
from xsave.guest.xen.machine import Machine


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine of 16 MiB."""
    directory = tmp_path_factory.mktemp("machine")
    xen_machine.create_files(directory, 16 * MIB >> 12, 1)
    return Machine(directory, "m")


@given(st.data(), st.integers(0, 9))
def test_each_frame_gets_its_page(machine, data, at):
    """Every frame named gets the row named with it, every other frame keeps what it has."""
    mfns = data.draw(st.lists(st.integers(1024, 1200), unique=True))
    rows = np.array([data.draw(st.integers(0, 29)) for _ in mfns], np.int64)
    content = np.random.default_rng(at).integers(0, 256, at + 30 * 4096, np.uint8)
    pages = content[at:].reshape(30, 4096)
    expected = machine.pages.copy()
    expected[mfns] = pages[rows]
    machine.write_frames(np.array(mfns, np.uint64), pages, rows)
    assert (machine.pages == expected).all()


def test_thousands_of_frames(machine):
    """More frames in a row than one system call takes are all filled."""
    mfns = np.random.default_rng(1).permutation(np.arange(1200, 4000)).astype(np.uint64)
    pages = np.random.default_rng(2).integers(0, 256, (2800, 4096), np.uint8)
    machine.write_frames(mfns, pages, np.arange(2800))
    assert (machine.pages[mfns.astype(np.intp)] == pages).all()


@pytest.mark.parametrize("name, mfns", [("write_vectors", [1024, 1025]), ("os.pwrite", [1024])])
def test_no_space_is_an_error(machine, monkeypatch, name, mfns):
    """A file system that is full is a StorageError, not the death of the process."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"{xen_machine.__name__}.{name}", full)
    pages, rows = np.zeros((len(mfns), 4096), np.uint8), np.arange(len(mfns))
    with pytest.raises(StorageError, match="No space left"):
        machine.write_frames(np.array(mfns), pages, rows)


def test_a_write_of_less_than_a_page_goes_on(machine, monkeypatch):
    """What one system call leaves of a page the next ones write."""
    honest = os.pwrite
    monkeypatch.setattr(
        f"{xen_machine.__name__}.os.pwrite", lambda fd, page, at: honest(fd, page[:1000], at)
    )
    page = np.arange(4096).astype(np.uint8)
    machine.write_frames(np.array([1030]), page.reshape(1, -1).copy(), np.array([0]))
    assert np.array_equal(machine.pages[1030], page)
