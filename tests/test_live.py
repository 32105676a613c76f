"""LiveWriter: whatever changes between rounds, and however, the last of each page is the last there
was. The guest is a stand-in whose frames, types and p2m change at random."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_gathering import as_bytes
from xsave import gathering, live, skipping, view
from xsave.canonical import canonicalise
from xsave.errors import GuestStateError
from xsave.frames import INVALID_P2M_ENTRY, PTE_PRESENT, PageType
from xsave.guest.xen.domctl import VcpuState
from xsave.image.buffers import reader
from xsave.image.pages import PageBatch
from xsave.image.stream import StreamDecoder
from xsave.live import LiveWriter
from xsave.p2m import Located
from xsave.progress import ignore
from xsave.public import VcpuGuestContext

NR_FRAMES = 512
SIZE = 40
ROOT, START_INFO, P2M_PAGE, LIST_PAGE, FIRST = 0, 1, 2, 3, 4
_INVALID = np.uint64(INVALID_P2M_ENTRY)


class Guest:
    """A domctl with SIZE pfns; what is written, or has another pfn, owner or type than before, is
    in `dirty`, by frame, as its log says."""

    domid = 1

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.free = self.rng.permutation(np.arange(1, NR_FRAMES)).tolist()
        m2p, owner = np.full(NR_FRAMES, _INVALID), np.zeros(NR_FRAMES, np.uint16)
        mem = np.zeros((NR_FRAMES, 512), np.uint64)
        self.machine = SimpleNamespace(
            mem=mem, m2p=m2p, owner=owner, nr_frames=NR_FRAMES,
            resident=lambda mfns: np.ones(mfns.size, bool), pages=mem.view(np.uint8),
            let_go=lambda mfns: None,
        )  # fmt: skip
        self.types = np.zeros(NR_FRAMES, np.uint8)
        self.dirty = np.zeros(NR_FRAMES, bool)
        self.leaf = self.free[-1]
        mem[self.leaf] = _INVALID
        self.p2m = mem[self.leaf, :SIZE]
        for pfn in (P2M_PAGE, *(pfn for pfn in range(SIZE) if pfn != P2M_PAGE)):
            self.give(pfn)
        self.types[int(self.p2m[ROOT])] = PageType.L4TAB_PINNED

    def give(self, pfn):
        """A fresh frame, all zero: nobody wrote to it."""
        mfn = self.free.pop()
        if mfn != self.leaf:
            self.machine.mem[mfn] = 0
        self.p2m[pfn], self.machine.m2p[mfn], self.machine.owner[mfn] = mfn, pfn, self.domid
        self.types[mfn] = PageType.NOTAB
        self.dirty[[mfn, self.leaf]] = True

    def take(self, pfn):
        mfn = int(self.p2m[pfn])
        self.free.insert(0, mfn)
        self.machine.m2p[mfn], self.p2m[pfn], self.machine.owner[mfn] = _INVALID, _INVALID, 0
        self.dirty[[mfn, self.leaf]] = True

    def use(self, mfn, kind):
        """The hypervisor gives a frame another type."""
        self.types[mfn] = kind
        self.dirty[mfn] = True

    def write(self, pfn, entries):
        mfn = int(self.p2m[pfn])
        self.machine.mem[mfn] = entries
        self.dirty[mfn] = True

    # -- what a LiveWriter asks ---

    def state(self):
        return SimpleNamespace(
            shared_info_mfn=0, config=b"{}\0", xen_version=(4, 17), cpuid_policy=b"",
            msr_policy=b"", tsc=(0, 0, 0, 0), never_run=False,
        )  # fmt: skip

    def ask_state(self):
        return self.state

    def page_types(self, mfns):
        return self.types[mfns.astype(np.intp)]

    def ask_vcpus(self):
        return self.vcpus

    def vcpus(self):
        context = VcpuGuestContext()
        context.ctrlreg[3] = int(self.p2m[ROOT]) << 12
        context.user_regs.rdx = int(self.p2m[START_INFO])
        return [VcpuState(0, bytes(context), b"", b"", b"")]

    def locate(self):
        frame_of_lists = self.p2m[[LIST_PAGE]]
        return Located(SIZE, np.array([self.leaf], np.uint64), frame_of_lists)


class Log:
    """The stand-in's writes. during: what it does before each peek, one after the other; times:
    how often each pfn was sent."""

    kind = "test"
    peeks = True

    def __init__(self, guest, during=()):
        self.guest, self.pages = guest, guest.machine.mem
        self.touched = guest.machine.resident
        self.during, self.times = list(during), Counter()

    def peek(self):
        if self.during:
            act(self.guest, *self.during.pop(0))
        return np.flatnonzero(self.guest.dirty)

    def clean(self):
        found, self.guest.dirty = self.guest.dirty, np.zeros(NR_FRAMES, bool)
        return np.flatnonzero(found)

    def ask_last(self):
        return self.clean


actions = st.tuples(
    st.sampled_from(["write", "zero", "table", "stale table", "data", "hole", "exchange", "grow"]),
    st.integers(FIRST, SIZE - 1),
)


def act(guest, action, pfn):
    """Do one thing to one page."""
    backed = guest.p2m[pfn] != _INVALID
    mfn = int(guest.p2m[pfn]) if backed else 0
    if action == "hole" and backed:
        guest.take(pfn)
    elif action in ("exchange", "grow"):
        if backed:
            guest.take(pfn)
        guest.give(pfn)
    elif action == "write" and backed and not guest.types[mfn]:
        guest.write(pfn, guest.rng.integers(1, 1 << 60, 512, np.uint64))
    elif action == "zero" and backed and not guest.types[mfn]:
        guest.write(pfn, 0)
    elif action in ("table", "stale table") and backed:
        others = guest.p2m[guest.p2m != _INVALID]
        entries = np.zeros(512, np.uint64)
        entries[:9] = others[:9] << np.uint64(12) | np.uint64(PTE_PRESENT)
        if action == "stale table":  # a frame that is nobody's: it does not resolve for now
            entries[20] = np.uint64(guest.free[-1] << 12 | PTE_PRESENT)
        guest.write(pfn, entries)
        guest.use(mfn, PageType.L1TAB)
    elif action == "data" and backed:  # not a table any more, and nobody writes to it
        guest.use(mfn, PageType.NOTAB)


def settle(guest):
    """A suspended guest's tables name only its own frames."""
    for pfn in np.flatnonzero(guest.p2m != _INVALID).tolist():
        mfn = int(guest.p2m[pfn])
        if guest.types[mfn]:
            level = np.array([guest.types[mfn] & 7])
            table = guest.machine.mem[mfn : mfn + 1]
            if canonicalise(table, level, guest.machine.m2p, guest.p2m).deferred[0]:
                guest.write(pfn, 0)


@pytest.fixture(autouse=True, scope="module")
def guest_p2m():
    """Let the writer find the stand-in's p2m."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(view.guest_p2m, "locate", lambda domctl, *_: domctl.locate())
        patched.setattr(live, "_LOOK_AGAIN_S", 0)
        yield


def migrate(guest, rounds, zeroes, log=None):
    """Write all of it, with these actions before each round and before the end; return
    {pfn: (type, bytes or None)} as the last records have it."""
    out, log = [], log or Log(guest)
    writer = LiveWriter(guest, lambda bs: out.append(as_bytes(bs)), ignore, log, zeroes=zeroes)
    writer.begin()
    for before in rounds:
        sent = writer.send_round()
        assert sent.nr_pages + sent.skipped_pages <= SIZE
        for action in before:
            act(guest, *action)
        writer.look()
    settle(guest)
    writer.finish()
    last = {}
    for item in StreamDecoder(reader(b"".join(out))):
        if isinstance(item.value, PageBatch):
            log.times.update(item.value.pfns.tolist())
            pages = iter(item.value.pages)
            for pfn, kind, data in zip(
                item.value.pfns.tolist(),
                item.value.types.tolist(),
                item.value.has_data,
                strict=True,
            ):
                content = bytes(next(pages)) if data else last.get(pfn, (0, bytes(4096)))[1]
                last[pfn] = (kind, content)
    return last


def expected(guest):
    """What a save of the guest as it stands now would say of each pfn."""
    found = {}
    for pfn in range(SIZE):
        if guest.p2m[pfn] == _INVALID:
            found[pfn] = (PageType.XTAB, None)
            continue
        mfn = int(guest.p2m[pfn])
        page, kind = guest.machine.mem[mfn], int(guest.types[mfn])
        if kind:
            level = np.array([kind & 7])
            page = canonicalise(page[None], level, guest.machine.m2p, guest.p2m).tables[0]
        found[pfn] = (kind, page.tobytes())
    return found


@given(st.integers(0, 99), st.lists(st.lists(actions, max_size=12), max_size=5), st.booleans())
def test_the_last_of_each_page_counts(seed, rounds, zeroes):
    """Pages written, emptied, exchanged, given up and taken back, tables that come, go and do not
    resolve: in the end the stream says of every pfn what the suspended guest has there."""
    guest = Guest(seed)
    is_as_expected(migrate(guest, rounds, zeroes), guest)


def is_as_expected(last, guest):
    want = expected(guest)
    assert set(last) == set(range(SIZE))
    for pfn in range(FIRST, SIZE):
        kind, content = last[pfn]
        kind = PageType.NOTAB if kind == PageType.XALLOC else kind
        assert kind == want[pfn][0], pfn
        if want[pfn][1] is not None:
            assert content == want[pfn][1], pfn
    present = np.frombuffer(last[P2M_PAGE][1], np.uint64)[:SIZE]
    assert np.array_equal(present != _INVALID, guest.p2m != _INVALID)


@pytest.fixture
def small_rounds(monkeypatch):
    """Rounds of few pages, and a look at what was written again before each few of them."""
    monkeypatch.setattr(gathering, "MAX_BATCH", 4)
    monkeypatch.setattr(gathering, "_WINDOW", 8)
    for place, name in (
        (live, "MAX_BATCH"), (live, "_FEW_PAGES"), (live, "_LEAST_BYTES"),
        (skipping, "_FIRST_S"), (skipping, "_INTERVAL_S"), (skipping, "_PART"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, 0)


@given(
    st.integers(0, 99), st.lists(st.lists(actions, max_size=4), min_size=1, max_size=5),
    st.lists(actions, max_size=60), st.booleans(),
)  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("small_rounds")
def test_what_happens_during_a_round(seed, rounds, during, zeroes):
    """The same, between one batch of a round and the next: pages that are left out and change
    into something else before they are sent, too."""
    guest = Guest(seed)
    is_as_expected(migrate(guest, rounds, zeroes, Log(guest, during)), guest)


@pytest.mark.usefixtures("small_rounds")
def test_what_is_written_again_is_left_out():
    """An ordinary page that was written since the round began is not sent in it, but once more
    only; nor is what was written between switching the log on and the first round. What has had its
    turn before comes again, a page table always."""
    guest = Guest(6)
    guest.dirty[:] = False
    act(guest, "write", 12)
    act(guest, "table", 13)
    log = Log(guest, [("write", 20), ("table", 13), ("write", 5), ("table", 31), ("write", 12)])
    is_as_expected(migrate(guest, [[]], True, log), guest)
    assert [log.times[pfn] for pfn in (12, 20, 31)] == [1, 1, 1]
    assert [log.times[pfn] for pfn in (5, 13)] == [2, 2]


@pytest.mark.usefixtures("small_rounds")
def test_a_log_that_is_slow_to_ask_is_not_asked():
    guest = Guest(7)
    log = Log(guest, [("write", 20)])
    log.peeks = False
    is_as_expected(migrate(guest, [[]], True, log), guest)
    assert log.during
    assert {log.times[pfn] for pfn in range(FIRST, SIZE)} == {1}


def test_a_table_that_changes_its_type_only():
    """A table that becomes data, or data that become a table, without a write: other bytes."""
    guest = Guest(1)
    act(guest, "table", 10)
    before = [[], [("data", 10)]]
    last = migrate(guest, before, True)
    assert last[10] == (PageType.NOTAB, guest.machine.mem[int(guest.p2m[10])].tobytes())


def test_an_empty_page_is_bytes_where_there_were_some():
    """XALLOC is only for what was never sent; without `zeroes` there is none at all."""
    guest = Guest(2)
    act(guest, "write", 20)
    last = migrate(guest, [[("zero", 20)]], True)
    assert last[20] == (PageType.NOTAB, bytes(4096))
    assert last[21] == (PageType.XALLOC, bytes(4096))
    kinds = {kind for kind, _ in migrate(Guest(2), [[]], False).values()}
    assert PageType.XALLOC not in kinds


def test_a_table_that_never_resolves_is_fatal(monkeypatch):
    """While it runs it is deferred, suspended it is an error."""
    guest = Guest(3)
    monkeypatch.setattr("tests.test_live.settle", lambda guest: None)
    with pytest.raises(GuestStateError, match="not the guest's"):
        migrate(guest, [[("stale table", 9)]], True)


def test_a_p2m_that_is_being_changed(monkeypatch):
    """A p2m that cannot be read at one moment is looked at again; what never can is an error."""
    guest, failures = Guest(4), [GuestStateError("not now")] * 3

    def locate(domctl, *_):
        if failures:
            raise failures.pop()
        return domctl.locate()

    monkeypatch.setattr(view.guest_p2m, "locate", locate)
    assert set(migrate(guest, [[]], True)) == set(range(SIZE))
    failures += [GuestStateError("never")] * 100
    with pytest.raises(GuestStateError, match="never"):
        migrate(guest, [[]], True)


def test_a_deferred_table_that_resolves_without_a_write():
    """The frame it names becomes the guest's: the table is sent, as what it is."""
    guest = Guest(5)
    last = migrate(guest, [[("stale table", 9)], [("exchange", 11)]], True)
    assert last[9] == expected(guest)[9]
    assert last[9][0] == PageType.L1TAB
