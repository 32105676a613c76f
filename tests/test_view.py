"""A view of a guest's memory that only looks at what the log names is the same as a fresh one,
whatever the guest does to its p2m, Xen to the m2p, owners and types; and says what changed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsave import view
from xsave.errors import GuestStateError
from xsave.frames import INVALID_P2M_ENTRY, PageType
from xsave.p2m import PER_PAGE, Located
from xsave.view import View

NR_FRAMES, SIZE, NR_LEAVES = 4096, 3 * PER_PAGE - 100, 3
FIRST_FRAME = 100
_INVALID = np.uint64(INVALID_P2M_ENTRY)
#: Pfns that things happen to: few, so that they happen again; in all three p2m pages.
PFNS = [5, 512, SIZE - 1]
LEAF_PFNS = [1000, 1001, 1002]


class Guest:
    """A domctl of a guest of SIZE pfns; what its log says is in `dirty`."""

    domid = 7

    def __init__(self):
        mem = np.zeros((NR_FRAMES, 512), np.uint64)
        self.machine = SimpleNamespace(
            mem=mem,
            m2p=np.full(NR_FRAMES, _INVALID),
            owner=np.zeros(NR_FRAMES, np.uint16),
            nr_frames=NR_FRAMES,
        )
        self.types = np.zeros(NR_FRAMES, np.uint8)
        self.dirty = set()
        mfns = FIRST_FRAME + np.random.default_rng(1).permutation(SIZE)
        self.leaves = mfns[LEAF_PFNS]
        mem[self.leaves] = _INVALID
        for pfn, mfn in enumerate(mfns.tolist()):
            self.set_entry(pfn, mfn)
        self.machine.m2p[mfns] = np.arange(SIZE)
        self.machine.owner[mfns] = self.domid
        self.size, self.failing = SIZE, False

    def set_entry(self, pfn, entry):
        """The guest writes to its p2m."""
        leaf = int(self.leaves[pfn // PER_PAGE])
        self.machine.mem[leaf, pfn % PER_PAGE] = entry
        self.dirty.add(leaf)

    def entry(self, pfn):
        return int(self.machine.mem[int(self.leaves[pfn // PER_PAGE]), pfn % PER_PAGE])

    def mark(self, mfn, **columns):
        """Xen changes a frame's pfn, owner or type."""
        for name, value in columns.items():
            table = self.types if name == "type" else getattr(self.machine, name)
            table[mfn] = value
        self.dirty.add(mfn)

    def page_types(self, mfns):
        return self.types[mfns.astype(np.intp)]

    def locate(self):
        if self.failing:
            raise GuestStateError("not now")
        nr = -(-self.size // PER_PAGE)
        return Located(self.size, self.leaves[:nr].astype(np.uint64), np.empty(0, np.uint64))


@pytest.fixture(autouse=True, scope="module")
def located():
    """Let the view find the stand-in's p2m."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(view.guest_p2m, "locate", lambda domctl, shared: domctl.locate())
        yield


pfns = st.sampled_from(PFNS)
frames = st.integers(FIRST_FRAME, FIRST_FRAME + SIZE + 20)
actions = st.one_of(
    st.tuples(st.just("entry"), pfns, frames | st.just(INVALID_P2M_ENTRY) | st.just(NR_FRAMES)),
    st.tuples(st.sampled_from(["swap", "swap entries", "swap m2p"]), pfns, pfns),
    st.tuples(st.just("m2p"), pfns, pfns | st.just(INVALID_P2M_ENTRY) | st.just(SIZE)),
    st.tuples(st.just("own m2p"), pfns, st.just(0)),
    st.tuples(st.just("owner"), pfns, st.sampled_from([0, 7])),
    st.tuples(st.just("type"), pfns, st.sampled_from([PageType.NOTAB, PageType.L1TAB])),
    st.tuples(st.just("write"), pfns, st.just(0)),
    st.tuples(st.just("size"), st.sampled_from([SIZE, SIZE - 3, 2 * PER_PAGE]), st.just(0)),
    st.tuples(st.just("leaf"), st.just(1), st.booleans()),
)


def act(guest, action, one, other):
    """Do one thing to the frame that a pfn's entry names, or to the entry."""
    if action == "size":
        guest.size = one
    elif action == "leaf":  # a page of the p2m is nobody's pfn for a while
        guest.mark(int(guest.leaves[one]), m2p=LEAF_PFNS[one] if other else _INVALID)
    elif action == "entry":
        guest.set_entry(one, other)
    elif action.startswith("swap"):
        a, b = guest.entry(one), guest.entry(other)
        if action != "swap m2p":
            guest.set_entry(one, b)
            guest.set_entry(other, a)
        if action != "swap entries" and max(a, b) < NR_FRAMES:
            guest.mark(a, m2p=other)
            guest.mark(b, m2p=one)
    elif (mfn := guest.entry(one)) < NR_FRAMES and action == "own m2p":
        guest.mark(mfn, m2p=one)
    elif mfn < NR_FRAMES:
        guest.mark(mfn, **({} if action == "write" else {action: other}))


def look(guest, seen):
    """Look again; return what is said to have changed, None if it cannot be looked at."""
    dirty, guest.dirty = np.array(sorted(guest.dirty), np.int64), set()
    try:
        return seen.look(None, dirty), set(dirty.tolist())
    except GuestStateError:
        guest.dirty = set(dirty.tolist())  # the writer comes again with the same
        return None


@settings(max_examples=400, deadline=None)
@given(st.lists(st.lists(actions, max_size=6), max_size=6))
def test_the_same_as_a_fresh_one(rounds):
    """Round by round: entries, types and pfns of pages are those of a view that has seen nothing
    before; all that changed is named, and the dirty pages are those whose frames are dirty."""
    guest = Guest()
    seen = View(guest)
    assert look(guest, seen)
    p2m, types = seen.p2m.copy(), seen.types.copy()
    for number, what in enumerate(rounds):
        for action in what:
            act(guest, *action)
        guest.failing = number % 3 == 2
        found = look(guest, seen)
        guest.failing = False
        fresh = View(guest)
        try:
            fresh.look(None, np.empty(0, np.int64))
        except GuestStateError:
            assert found is None
            continue
        if found is None:
            continue
        changes, dirty = found
        for name in ("p2m", "types", "frames", "list_frames"):
            assert np.array_equal(getattr(seen, name), getattr(fresh, name)), name
        common = min(p2m.size, seen.p2m.size)
        differ = (p2m[:common] != seen.p2m[:common]) | (types[:common] != seen.types[:common])
        assert set(np.flatnonzero(differ).tolist()) <= set(changes.other.tolist())
        backed = {mfn: pfn for pfn, mfn in enumerate(seen.p2m.tolist()) if mfn != INVALID_P2M_ENTRY}
        assert sorted(changes.written.tolist()) == sorted(
            backed[mfn] for mfn in dirty if mfn in backed
        )
        p2m, types = seen.p2m.copy(), seen.types.copy()


def test_it_looks_at_no_more_than_that():
    """One frame with another type: one pfn is looked at; one entry: the pfns of its page."""
    guest = Guest()
    seen = View(guest)
    assert look(guest, seen)
    guest.mark(guest.entry(600), type=PageType.L1TAB)
    assert look(guest, seen)[0].other.tolist() == [600]
    guest.set_entry(5, guest.entry(5))
    assert look(guest, seen)[0].other.tolist() == [*range(PER_PAGE), LEAF_PFNS[0]]
    assert look(guest, seen)[0].other.tolist() == []
