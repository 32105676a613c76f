"""An image says nothing of the host: the same state gives the same bytes, and no mfn is in them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.flows.flow import (
    MIB,
    console,
    create,
    destroy,
    nothing_is_left,
    restore,
    save,
    ticks,
    wait_for_tick,
)
from xsave.errors import SuspendFailed
from xsave.frames import PTE_FRAME_MASK, PTE_PRESENT
from xsave.guest.xen.machine import DOMID_XEN
from xsave.host.host import add_host
from xsave.image.buffers import reader
from xsave.image.stream import PageBatch, StreamDecoder

HOST_MEMORY = 8 << 30
#: Frames below 4 GiB are taken away, so that no mfn is a small number.
FIRST_MFN = 0x100000


def big_host(name, seed):
    """A host of 8 GiB that hands out frames above 4 GiB only."""
    host = add_host(name, HOST_MEMORY, seed)
    host.machine.owner[host.machine.first_frame : FIRST_MFN] = DOMID_XEN
    return host


def own_mfns(host, name="g"):
    """Return the frames the domain owns, all of them recognisable."""
    with host.find(name) as domctl:
        mfns = np.flatnonzero(host.machine.owner == domctl.domid).astype(np.uint64)
    assert mfns.size >= 8 * MIB >> 12
    assert mfns.min() >= FIRST_MFN
    return mfns


def frame_numbers(image, mfns):
    """Return (offset, value) of every aligned u64 of the image that holds one of the mfns: is
    one, has one in either half, or is one with flags around it (a page-table entry, a cr3). In
    page tables only the last counts: pfn 0x162 with its flags looks like frame 0x162067."""
    is_mfn = np.zeros(HOST_MEMORY >> 12, bool)
    is_mfn[mfns] = True
    found = []
    for offset, words, is_table in pieces(image):
        shifted = among(is_mfn, (words & np.uint64(PTE_FRAME_MASK)) >> np.uint64(12))
        hit = shifted & ((words & np.uint64(PTE_PRESENT) != 0) | (words & np.uint64(0xFFF) == 0))
        bare = among(is_mfn, words)
        bare |= among(is_mfn, words.view(np.uint32).astype(np.uint64)).reshape(-1, 2).any(axis=1)
        hit |= bare & ~is_table
        found += [(offset + 8 * int(i), int(words[i])) for i in np.flatnonzero(hit)]
    return found


def pieces(image):
    """Yield (offset, words (n,) u64, is_table (n,) bool) for every header, record and batch."""
    for item in StreamDecoder(reader(image)):
        value = item.value
        if isinstance(value, PageBatch):
            levels = value.types[value.has_data] & 7
            words = np.ascontiguousarray(value.pages).view(np.uint64)
            yield value.pages_offset, words.reshape(-1), np.repeat(levels != 0, 512)
            words = value.pfns
        else:
            data = value.encode()
            words = np.frombuffer(data + bytes(-len(data) % 8), np.uint64)
        yield item.offset, words, np.zeros(words.size, bool)


def among(is_mfn, values):
    inside = values < np.uint64(is_mfn.size)
    return inside & is_mfn[np.where(inside, values, np.uint64(0))]


def test_the_same_state_gives_the_same_bytes(xsave_home, tmp_path):
    """The same deterministic guest on hosts with other frames: the images are identical; so are
    those of the next generation, which ran on in frames that differ again; and neither holds a
    frame number of the hosts it came from."""
    a, b = big_host("a", 11), big_host("b", 22)
    for host in (a, b):
        create(host, deterministic=7)
    seen = {host.name: own_mfns(host) for host in (a, b)}
    assert (seen["a"] != seen["b"]).any()
    for host in (a, b):
        save(host, tmp_path / host.name)
    image = (tmp_path / "a").read_bytes()
    assert image == (tmp_path / "b").read_bytes()
    assert frame_numbers(image, seen["a"]) == []
    for host in (a, b):
        restore(host, tmp_path / "a")
        seen[host.name] = np.union1d(seen[host.name], own_mfns(host))
        assert ticks(wait_for_tick(host))[0] > 1
    for host in (a, b):
        save(host, tmp_path / f"{host.name}2")
    second = (tmp_path / "a2").read_bytes()
    assert second == (tmp_path / "b2").read_bytes()
    assert second != image
    assert frame_numbers(second, seen["a"]) == []
    assert frame_numbers(second, seen["b"]) == []
    nothing_is_left_but_the_hole(a)


def test_a_host_can_be_as_busy_as_it_likes(xsave_home, tmp_path, monkeypatch):
    """No time-out ends the suspend of a deterministic guest, which would see that, but its own
    time only; by the real clock the same one does."""
    monkeypatch.setenv("XSAVE_SUSPEND_TIMEOUT", "0.00001")
    host = add_host("a", 64 * MIB, seed=1)
    create(host, deterministic=7)
    save(host, tmp_path / "img")
    create(host)
    wait_for_tick(host)
    with pytest.raises(SuspendFailed, match="in time"):
        save(host, tmp_path / "img")
    destroy(host)
    nothing_is_left(host)


def nothing_is_left_but_the_hole(host):
    """nothing_is_left, for a host whose lower frames were taken away."""
    host.machine.owner[host.machine.first_frame : FIRST_MFN] = 0x7FF4
    nothing_is_left(host)


def test_no_frame_number_in_real_time_either(xsave_home, tmp_path):
    """A guest that runs by the real clock, interrupted wherever it happens to be, twice: none of
    the frames it ever had is in either image."""
    host = big_host("a", 33)
    create(host)
    wait_for_tick(host, after=1)
    mfns = own_mfns(host)
    for name in ("first", "second"):
        save(host, tmp_path / name)
        assert frame_numbers((tmp_path / name).read_bytes(), mfns) == []
        restore(host, tmp_path / name)
        mfns = np.union1d(mfns, own_mfns(host))
        wait_for_tick(host)
    assert "CHECK FAILED" not in console(host)
    destroy(host)


@pytest.mark.parametrize(
    "plant",
    [lambda mfn: mfn, lambda mfn: mfn << 12 | 0x8000000000000067, lambda mfn: mfn << 32 | 5],
    ids=["mfn", "entry", "u32"],
)
def test_the_scan_finds_a_planted_frame_number(xsave_home, builtin_image, tmp_path, plant):
    """One mfn, bare or as an entry, in one word of one page: the scan names that very word."""
    host = big_host("a", 46)
    restore(host, builtin_image, paused=True)
    mfns = own_mfns(host)
    value = plant(int(mfns[9]))
    untouched = mfns[~host.machine.resident(mfns)]
    host.machine.mem[untouched[5], 77] = np.uint64(value)
    save(host, tmp_path / "img")
    image = (tmp_path / "img").read_bytes()
    by_chance = set(frame_numbers(builtin_image.read_bytes(), mfns))  # code, addresses
    assert len(by_chance) < 3
    ((offset, found),) = set(frame_numbers(image, mfns)) - by_chance
    assert found == value
    assert int.from_bytes(image[offset : offset + 8], "little") == value
