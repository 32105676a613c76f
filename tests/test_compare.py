"""compare sees every page: none that differs is missed, none that is equal is accused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.conftest import end_processes, make_home
from xsave.compare import compare, side
from xsave.frames import PageType
from xsave.host.channel import open_sink, open_source
from xsave.host.create import create
from xsave.host.host import add_host
from xsave.host.spawn import spawn
from xsave.restore import restore
from xsave.save import save

MEMORY = 16 << 20
NR_PAGES = MEMORY >> 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A saved guest that still stands on one host, and its restored copy on another."""
    image = str(tmp_path_factory.mktemp("compare") / "img")
    home = make_home()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XSAVE_HOME", str(home))
        a, b = add_host("a", 64 << 20, seed=1), add_host("b", 64 << 20, seed=2)
        create(a, "g", memory_bytes=MEMORY, deterministic=1)
        with a.find("g") as domctl, open_sink(image) as sink:
            save(domctl, sink.write, commit=sink.commit, leave="paused")
        with open_source(image) as source:
            restore(source, lambda name, _: spawn(b, name), paused=True, nr_frames=b.nr_frames)
        with a.find("g") as old, b.find("g") as new:
            yield old, new
    end_processes(home)
    shutil.rmtree(home, ignore_errors=True)


def test_a_restored_guest_is_the_saved_one(pair):
    """Every page is on another frame and none differs; the classes add up to all pages."""
    found = compare(*pair)
    assert found.different == ()
    assert found.nr_pages == NR_PAGES
    assert found.moved_pages > NR_PAGES * 0.99
    classes = found.equal_pages, found.equal_tables, found.p2m_pages, found.rewritten_pages
    assert sum(classes) == NR_PAGES
    assert all(classes)


def test_samples_show_tables_and_others(pair):
    """The samples are real: each mfn is where the p2m says, half of them page tables."""
    old, new = pair
    a, b = side(old), side(new)
    samples = compare(old, new).samples
    assert len(samples) == 8
    assert sum(sample.page_type == "NOTAB" for sample in samples) == 4
    for sample in samples:
        assert (a.p2m[sample.pfn], b.p2m[sample.pfn]) == (sample.old_mfn, sample.new_mfn)


def some_pfn(one, kind):
    """Return a pfn of this kind."""
    if kind == "p2m":
        return int(one.p2m_pfns[0])
    tables = one.types != PageType.NOTAB
    tables[one.p2m_pfns] = tables[one.list_pfns] = tables[one.start_info_pfn] = kind != "table"
    wanted = tables if kind == "table" else ~tables
    return int(np.flatnonzero(wanted)[5])


@pytest.mark.parametrize("slot", [0, 511])
@pytest.mark.parametrize("kind", ["page", "table", "p2m"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_changed_word_is_seen(pair, which, kind, slot):
    """On either side, in a page, a page table or the p2m: exactly that pfn is named."""
    one = side(pair[which])
    pfn = some_pfn(one, kind)
    memory = pair[which].machine.mem
    before = int(memory[one.p2m[pfn], slot])
    # A software-available bit: the entry of a table stays what it was, but for this bit.
    memory[one.p2m[pfn], slot] = np.uint64(before ^ (1 << 10))
    try:
        different = compare(*pair).different
    finally:
        memory[one.p2m[pfn], slot] = np.uint64(before)
    if kind == "p2m":
        assert pfn in different
    else:
        assert different == (pfn,)
    assert compare(*pair).different == ()
