"""The p2m of the 2008 series: it grows, it has holes, and the toolstack finds it.

Mirrors "xen: make phys_to_machine structure dynamic" and "xen: add configurable max domain size"
(a p2m of leaves, bounded), "xen: efficiently support a holey p2m table" (one leaf of nothing but
holes, p2m_missing) and "xen: add p2m mfn_list_list" (a tree of mfns in shared_info, rebuilt after
a restore). With the balloon that makes a p2m grow and puts holes into it.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.flows.flow import (
    MIB,
    console,
    create,
    destroy,
    nothing_is_left,
    restore,
    runs_on,
    save,
    wait_for,
)
from tests.flows.forked import nothing_is_left as forked_nothing_is_left
from tests.flows.forked import restore as restore_bytes
from tests.flows.ruined import one_vcpu, refused
from tests.flows.series import (
    PAGES,
    boot,
    goes_on,
    pages,
    record,
    save_said,
    set_target,
    shared_info,
    sound,
    suspended,
    types,
)
from tests.image.pieces import index
from tests.image.synthetic import DATA, L1, NR_PFNS, NR_POPULATED, P2M, PvImage
from xsave import p2m as guest_p2m
from xsave.errors import HostCannotTake, UsageError
from xsave.frames import INVALID_P2M_ENTRY, PageType
from xsave.guest.xen.machine import DOMID_XEN
from xsave.host.host import add_host
from xsave.image import libxc
from xsave.image.libxc import X86PvP2mFrames
from xsave.image.stream import PageBatch
from xsave.image.xl import XlHeader
from xsave.public import SharedInfo

INVALID = np.uint64(INVALID_P2M_ENTRY)
ROOM = 16 * MIB
#: Where the p2m grows on in the tests of gaps: beyond the first list page, which covers 1 GiB.
FAR = 1 << 18


def tree(domctl):
    """Return (max_pfn, mfns of the list pages, mfns of the leaves) as the guest published them."""
    arch = shared_info(domctl).arch
    mem = domctl.machine.mem
    nr_leaves = -(-arch.max_pfn // 512)
    lists = mem[arch.pfn_to_mfn_frame_list_list, : -(-nr_leaves // 512)].copy()
    leaves = mem[lists].reshape(-1)[:nr_leaves].copy()
    for mfns in (lists, leaves):
        assert domctl.owned(mfns).all()
    return arch.max_pfn, lists, leaves


def backed(host, name="g"):
    """Return how many pfns have a frame, from the machine's side."""
    with host.find(name) as domctl:
        return domctl.info().memory_bytes >> 12


# ---- a p2m that grows


def test_a_guest_that_grew_is_saved_and_restored(host, tmp_path):
    """From 2048 pages to 3000: Xen gave it the frames, max_pfn is published, the image has a p2m
    of 3000 pfns, all backed; the restored guest has as many and counts on; it grows again."""
    boot(host, max_memory_bytes=ROOM)
    set_target(host, 3000)
    assert backed(host) == 3000
    before = save_said(host, tmp_path / "img")
    frames = record(tmp_path / "img", X86PvP2mFrames)
    assert (frames.start_pfn, frames.end_pfn, len(frames.pfns)) == (0, 2999, 6)
    assert (types(tmp_path / "img") != PageType.XTAB).all()
    sound(tmp_path / "img")
    restore(host, tmp_path / "img")
    goes_on(host, before)
    assert backed(host) == 3000
    set_target(host, ROOM >> 12)
    assert "of 4096 pfns" in console(host)
    save(host, tmp_path / "img")
    assert record(tmp_path / "img", X86PvP2mFrames).end_pfn == 4095
    nothing_is_left(host)


def test_growth_is_published_at_once(host):
    """A guest that grew, then suspended: shared_info's max_pfn and the tree cover the new pfns,
    each leaf names frames of the guest that the m2p knows by those pfns."""
    boot(host, max_memory_bytes=ROOM)
    with suspended(host) as domctl:
        assert tree(domctl)[0] == PAGES
    set_target(host, 2600)
    with suspended(host) as domctl:
        max_pfn, lists, leaves = tree(domctl)
        assert (max_pfn, lists.size, leaves.size) == (2600, 1, 6)
        p2m = domctl.machine.mem[leaves].reshape(-1)
        assert (domctl.machine.m2p[p2m[:2600]] == np.arange(2600)).all()
        assert (p2m[2600:] == INVALID).all()
    runs_on(host)


def test_the_target_travels_with_the_image(host, tmp_path):
    """The image says to how much memory the guest was asked to go, and how much it may have."""
    boot(host, max_memory_bytes=ROOM)
    for nr_pages in (2500, 1900):
        set_target(host, nr_pages)
        save(host, tmp_path / "img", leave="running")
        info = json.loads(record(tmp_path / "img", XlHeader).config)["b_info"]
        assert (info["target_memkb"], info["max_memkb"]) == (4 * nr_pages, ROOM >> 10)
    destroy(host)
    restore(host, tmp_path / "img")
    runs_on(host)
    assert backed(host) == 1900


@pytest.mark.parametrize("nr_pages", [0, -1, (ROOM >> 12) + 1])
def test_a_target_that_cannot_be(host, nr_pages):
    """No memory at all, or more than the domain may have: refused, the guest is not asked."""
    boot(host, max_memory_bytes=ROOM)
    with host.find("g") as domctl, pytest.raises(UsageError, match=r"16384"):
        domctl.set_target(nr_pages)
    assert backed(host) == PAGES


def test_a_guest_waits_for_memory(host):
    """The host has no frame left: the guest runs on as it is, tries again, and gets what comes."""
    create(host, max_memory_bytes=ROOM)  # in real time
    wait_for(lambda: "TICK 1 " in console(host))
    machine = host.machine
    free = np.flatnonzero(machine.owner == 0x7FF4)
    machine.owner[free] = DOMID_XEN
    with host.find("g") as domctl:
        domctl.set_target(2100)
    runs_on(host)
    assert backed(host) == PAGES
    machine.owner[free] = 0x7FF4
    wait_for(lambda: "balloon: 2100 pages of 2100 pfns" in console(host))


def test_a_p2m_has_a_largest_size(host):
    """MAX_DOMAIN_PAGES, 16 GiB: a guest asked to grow there has no room for it, and runs on."""
    boot(host, max_memory_bytes=ROOM, cmdline=f"balloon_at={16 << 30}")
    with host.find("g") as domctl:
        domctl.set_target(PAGES + 100)
    runs_on(host)
    assert backed(host) == PAGES
    assert "balloon:" not in console(host)
    with suspended(host) as domctl:
        assert tree(domctl)[0] == PAGES


# ---- a p2m with holes


def test_given_back_pages_are_holes(host, tmp_path):
    """A guest that shrank: Xen has the frames, the image has XTAB there, the restored guest no
    frames; asked for its old size it fills the holes, the p2m does not grow."""
    boot(host)
    set_target(host, 1500)
    assert backed(host) == 1500
    before = save_said(host, tmp_path / "img")
    found = types(tmp_path / "img")
    assert found.size == PAGES
    assert np.count_nonzero(found == PageType.XTAB) == PAGES - 1500
    sound(tmp_path / "img")
    restore(host, tmp_path / "img")
    text = goes_on(host, before)
    assert backed(host) == 1500
    assert "balloon:" not in text
    set_target(host, PAGES)
    assert f"balloon: {PAGES} pages of {PAGES} pfns" in console(host)
    save(host, tmp_path / "img")
    assert (types(tmp_path / "img") != PageType.XTAB).all()
    nothing_is_left(host)


def test_a_hole_has_no_frame_and_no_mapping(host):
    """The p2m's entries of pages given back are invalid, and no page table maps their frames:
    Xen took them back although it refuses frames that are in use."""
    boot(host)
    with suspended(host) as domctl:
        was = domctl.machine.mem[tree(domctl)[2]].reshape(-1)[:PAGES].copy()
    set_target(host, 1600)
    with suspended(host) as domctl:
        now = domctl.machine.mem[tree(domctl)[2]].reshape(-1)[:PAGES]
        holes = now == INVALID
        assert np.count_nonzero(holes) == PAGES - 1600
        assert (now[~holes] == was[~holes]).all()
        assert not domctl.owned(was[holes]).any()
    runs_on(host)


def test_gaps_share_one_leaf(host, tmp_path):
    """A guest that grew beyond a gap of nearly 1 GiB: every leaf of the gap is one and the same
    page, p2m_missing, all of it invalid; tools see a complete p2m; so does the restored guest,
    for which page and tree have other mfns."""
    boot(host, max_memory_bytes=ROOM, cmdline=f"balloon_at={FAR * 4096}")
    set_target(host, PAGES + 100)
    with suspended(host) as domctl:
        check_gap(domctl)
    before = save_said(host, tmp_path / "img")
    frames = record(tmp_path / "img", X86PvP2mFrames)
    assert frames.end_pfn + 1 == FAR + 100
    assert len(frames.pfns) == FAR // 512 + 1
    (missing,) = set(frames.pfns[PAGES // 512 : -1].tolist())
    assert len(set(frames.pfns.tolist())) == PAGES // 512 + 2
    assert (pages(tmp_path / "img", [missing]) == INVALID).all()
    found = types(tmp_path / "img")
    assert (found[PAGES:FAR] == PageType.XTAB).all()
    assert (found[FAR:] != PageType.XTAB).all()
    sound(tmp_path / "img")
    restore(host, tmp_path / "img")
    goes_on(host, before)
    with suspended(host) as domctl:
        check_gap(domctl)
    set_target(host, PAGES)
    set_target(host, PAGES + 200)
    with suspended(host) as domctl:
        assert tree(domctl)[0] == FAR + 200
    runs_on(host)


def check_gap(domctl):
    """The leaves of the gap are one page of holes, those around it are not."""
    max_pfn, _, leaves = tree(domctl)
    assert max_pfn == FAR + 100
    (missing,) = set(leaves[PAGES // 512 : -1].tolist())
    assert len(set(leaves.tolist())) == PAGES // 512 + 2
    assert (domctl.machine.mem[missing] == INVALID).all()
    p2m = domctl.machine.mem[leaves].reshape(-1)[:max_pfn]
    known = np.flatnonzero(p2m != INVALID)
    assert known.size == PAGES + 100
    assert (domctl.machine.m2p[p2m[known]] == known).all()


def test_a_gap_of_gigabytes_has_one_list_page(tmp_path, xsave_home):
    """A gap that whole list pages would describe: they are one page too, of nothing but
    p2m_missing; and it is saved and restored as any other."""
    host = add_host("large", 1 << 31, seed=3)
    boot(host, max_memory_bytes=ROOM, cmdline=f"balloon_at={3 << 30}")
    set_target(host, PAGES + 64)
    with suspended(host) as domctl:
        _, lists, leaves = tree(domctl)
        assert lists.size == 4
        assert lists[1] == lists[2]
        assert len(set(lists.tolist())) == 3
        assert len(set(leaves.tolist())) == PAGES // 512 + 2
    before = save_said(host, tmp_path / "img")
    restore(host, tmp_path / "img")
    goes_on(host, before)


# ---- the tree in shared_info


def test_the_tree_is_rebuilt_after_a_restore(host, tmp_path):
    """The image names no tree; the restored guest publishes one with its new mfns, and not one
    of the old; a cancelled suspend leaves the guest with a tree too."""
    boot(host)
    with suspended(host) as domctl:
        before = tree(domctl)
        top = shared_info(domctl).arch.pfn_to_mfn_frame_list_list
    with suspended(host) as domctl:
        again = tree(domctl)
        assert all(np.array_equal(a, b) for a, b in zip(before, again, strict=True))
    save(host, tmp_path / "img")
    blob = record(tmp_path / "img", libxc.SharedInfo).content
    published = SharedInfo.from_buffer_copy(bytes(blob)).arch
    assert (published.max_pfn, published.pfn_to_mfn_frame_list_list) == (PAGES, 0)
    old = np.array([top, *before[1], *before[2]]).astype(int)
    host.machine.owner[old] = DOMID_XEN  # none of these again
    restore(host, tmp_path / "img")
    with host.find("g") as domctl:
        wait_for(lambda: shared_info(domctl).arch.pfn_to_mfn_frame_list_list)
    with suspended(host) as domctl:
        after = tree(domctl)
        assert after[0] == PAGES
        assert not np.isin(after[2], before[2]).any()
    runs_on(host)
    destroy(host)


# ---- an image with more than one P2M_FRAMES record


def grown(start, end, pfns, late):
    """A sound guest's image with a second list behind its pages, then pages of these pfns."""

    def edit(pieces):
        at = index(pieces, "X86_TSC_INFO")
        frames = X86PvP2mFrames(start, end, np.array(pfns, np.uint64))
        content = np.full((len(late), 4096), 7, np.uint8)
        batch = PageBatch(np.array(late, np.uint64), np.zeros(len(late), np.uint8), content)
        new = [PvImage.record(batch)] if late else []
        return [*pieces[:at], PvImage.record(frames), *new, *pieces[at:]]

    return one_vcpu().encode("xl", edit)


LATE = [NR_PFNS + 44, 599]


@pytest.mark.parametrize(
    ("start", "end", "pfns"),
    [(0, 599, [P2M, DATA]), (512, 599, [DATA]), (300, 599, [P2M, DATA])],
    ids=["all", "new", "from the middle of a page"],
)
def test_a_second_list_makes_the_p2m_longer(world, start, end, pfns):
    """A guest that grew while it was sent: its list comes again, whole or in part, and then pages
    of new pfns. Restored, the p2m has them: their frames, and holes between."""
    host, forks = world
    restore_bytes(host, grown(start, end, pfns, LATE), cpu_mismatch="allow")
    with host.find("synthetic") as domctl:
        state = domctl.state()
        assert state.p2m_size == end + 1
        assert state.p2m_frames.tolist() == [P2M, DATA]
        found = guest_p2m.find(domctl, state, shared_info(domctl)).p2m
        content = host.machine.pages[found[LATE]]
        leaves = host.machine.mem[found[[P2M, DATA]]].reshape(-1)
        domctl.destroy()
    assert (content == 7).all()
    assert np.flatnonzero(found != INVALID).tolist() == [*range(NR_POPULATED), *LATE]
    assert (leaves[: end + 1] == found).all()
    assert (leaves[end + 1 :] == INVALID).all()
    host.settle()
    forked_nothing_is_left(host, forks)


@pytest.mark.parametrize(
    ("start", "end", "pfns", "late"),
    [
        (1024, 1535, [DATA], []),
        (0, 599, [P2M], []),
        (0, 599, [P2M, 600], []),
        (0, 599, [P2M, NR_PFNS], []),
        (0, 599, [P2M, L1], []),
        (0, 599, [P2M, P2M], []),
        (0, 599, [P2M, DATA], [600]),
    ],
    ids=["a gap", "too short", "outside", "not there", "a table", "shared", "a later page"],
)
def test_a_second_list_that_is_wrong(world, start, end, pfns, late):
    """It leaves a range out, is too short, names a page outside the p2m, one that is not there, a
    page table, one page for two ranges that hold frames; or a page comes beyond it."""
    refused(world, grown(start, end, pfns, late))


def test_a_second_list_too_large_for_the_host(world):
    """The bound of the first list is that of all."""
    count = (1 << 23) // 512
    refused(world, grown(0, (1 << 23) - 1, [P2M] * count, []), HostCannotTake)
