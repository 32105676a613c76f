"""Gathering: the records' bytes are those of a page-by-page save, whatever was touched."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave import gathering
from xsave.frames import INVALID_P2M_ENTRY, PageType
from xsave.gathering import Gatherer, Patches
from xsave.image.buffers import Rows, Zeros
from xsave.image.pages import MAX_BATCH, page_data_header

NR_FRAMES = 4096


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    """Several windows in few pages."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gathering, "_WINDOW", MAX_BATCH)
        yield


def domain(kinds, seed):
    """Return (domctl, p2m, types, pages): a stand-in for a domain of shuffled frames.

    kinds: 0 no frame, 1 never touched, 2 touched and zero, 3 not zero.
    """
    rng = np.random.default_rng(seed)
    p2m = rng.permutation(NR_FRAMES)[: len(kinds)].astype(np.uint64)
    kinds = np.array(kinds)
    p2m[kinds == 0] = INVALID_P2M_ENTRY
    mem = np.zeros((NR_FRAMES, 512), np.uint64)
    touched = np.zeros(NR_FRAMES, bool)
    touched[p2m[kinds >= 2].astype(np.intp)] = True
    full = p2m[kinds == 3].astype(np.intp)
    mem[full, rng.integers(0, 512, full.size)] = rng.integers(1, 1 << 60, full.size)
    machine = SimpleNamespace(mem=mem, resident=lambda mfns: touched[mfns.astype(np.intp)])
    types = np.where(kinds == 0, PageType.XTAB, PageType.NOTAB).astype(np.uint8)
    pages = np.zeros((len(kinds), 512), np.uint64)
    pages[kinds > 0] = mem[p2m[kinds > 0].astype(np.intp)]
    return SimpleNamespace(machine=machine), p2m, types, pages


def as_bytes(buffers):
    def data(buffer):
        if isinstance(buffer, Rows):
            buffer = buffer.gather()
        return bytes(buffer.nbytes) if isinstance(buffer, Zeros) else bytes(buffer)

    return b"".join(map(data, buffers))


KINDS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 400)).map(lambda pair: [pair[0]] * pair[1]),
    min_size=1,
    max_size=12,
).map(lambda runs: [kind for run in runs for kind in run][: NR_FRAMES - 1])


@given(KINDS, st.integers(0, 9), st.sets(st.integers(0, NR_FRAMES - 1), max_size=20))
def test_records_are_those_of_a_page_by_page_save(kinds, seed, some):
    """Every record holds its pfns, their types and each page's bytes, patched where asked, with
    nothing but real zeros as Zeros."""
    domctl, p2m, types, pages = domain(kinds, seed)
    patched = np.array(sorted(p for p in some if p < p2m.size and kinds[p]), np.int64)
    content = np.random.default_rng(seed).integers(0, 2, (patched.size, 512)).astype(np.uint64)
    content[::3] = 0
    pages[patched] = content
    nothing = (np.empty(0, np.uint64), np.empty((0, 512), np.uint64))
    patches = Patches.of([nothing, (patched, content)])
    gatherer = Gatherer(domctl, p2m, types, patches.among)
    done = 0
    for batch in gatherer:
        pfns = np.arange(done, batch.end_pfn, dtype=np.uint64)
        backed = pages[done : batch.end_pfn][types[done : batch.end_pfn] == PageType.NOTAB]
        expected = page_data_header(pfns, types[done : batch.end_pfn]) + backed.tobytes()
        assert as_bytes(batch.buffers) == expected
        assert batch.nr_pages == len(backed)
        assert batch.zero_pages == int((~backed.any(axis=1)).sum())
        zeros = sum(b.nbytes for b in batch.buffers if isinstance(b, Zeros))
        assert zeros == 4096 * batch.zero_pages
        assert batch.end_pfn - done <= MAX_BATCH
        done = batch.end_pfn
    assert done == p2m.size


def test_the_last_patch_of_a_pfn_counts():
    """Of several patches of one page the last is taken, as if written one after the other."""
    first = np.full((2, 512), 1, np.uint64)
    again = np.full((1, 512), 2, np.uint64)
    patches = Patches.of([(np.array([7, 3]), first), (np.array([7]), again)])
    assert patches.pfns.tolist() == [3, 7]
    assert patches.pages[:, 0].tolist() == [1, 2]
