"""What follows a guest: what is asked for at once, the rest from there on, each page once, and
nothing that may be another's by then."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from xsave.errors import GuestStateError
from xsave.image import postwire
from xsave.postcopy import LeftOut
from xsave.progress import Pages, Stage

NR_FRAMES = 1024
#: Every third pfn, in frames that lie otherwise; each fifth frame is empty.
PFNS = np.arange(0, 900, 3)
MFNS = np.random.default_rng(3).permutation(NR_FRAMES)[: PFNS.size].astype(np.int64)


class Wire:
    """A source, and what it sent: `pages` {pfn: bytes}, `order` of pfns."""

    def __init__(self, bandwidth=None):
        mem = np.random.default_rng(4).integers(1, 1 << 60, (NR_FRAMES, 512), np.uint64)
        mem[::5] = 0
        self.mem, self.held = mem, True
        self.let_go = []
        machine = SimpleNamespace(mem=mem, let_go=lambda mfns: self.let_go.append(mfns.tolist()))
        domctl = SimpleNamespace(machine=machine, check_held=self.check_held)
        self.pages, self.order, self.events, self.over = {}, [], [], False
        self.left_out = LeftOut(
            domctl, PFNS, MFNS, self.write, lambda: None, self.events.append, bandwidth
        )

    def check_held(self):
        if not self.held:
            raise GuestStateError("not held")

    def write(self, buffers):
        data = b"".join(bytes(memoryview(b).cast("B")) for b in buffers)
        kind, length = postwire.HEADER.unpack_from(data)
        assert len(data) == postwire.HEADER.size + length
        assert length <= postwire.MAX_BODY
        if kind == postwire.COMPLETE:
            self.over = True
            return
        assert kind == postwire.PAGE_DATA
        found = postwire.pages_of(memoryview(data)[postwire.HEADER.size :])
        with_bytes = iter(found.pages)
        for pfn, is_empty in zip(found.pfns.tolist(), found.is_empty.tolist(), strict=True):
            assert pfn not in self.pages
            self.pages[pfn] = bytes(4096) if is_empty else next(with_bytes).tobytes()
            self.order.append(pfn)


def test_all_once():
    """All pages come, each once, with the bytes of its frame; nothing of an empty one."""
    wire = Wire()
    while wire.left_out.send_more():
        pass
    wire.left_out.send_end()
    assert wire.order == PFNS.tolist()
    assert [wire.pages[p] for p in PFNS.tolist()] == [wire.mem[m].tobytes() for m in MFNS]
    assert wire.over
    assert wire.events[0] == Stage("migrate", "post-copy", "300 pages follow the guest")
    assert wire.events[-1] == Pages("migrate", 300, 300, 300 * 4096)


def test_what_is_asked_for_comes_first():
    """Then the ones behind it, then those before; what was sent already is not sent again."""
    wire = Wire()
    wire.left_out.send_more()
    assert wire.order == PFNS[:64].tolist()
    wire.left_out.send_wanted(np.array([600, 3]))
    wire.left_out.send_wanted(np.array([603, 600]))
    assert wire.order[64:] == [600, 603]
    assert wire.left_out.nr_faults == 2
    wire.left_out.send_wanted(np.array([606]))
    wire.left_out.send_more()
    assert wire.order[66:70] == [606, 609, 612, 615]
    while wire.left_out.send_more():
        pass
    assert sorted(wire.order) == PFNS.tolist()
    assert wire.left_out.nr_sent == 300


@pytest.mark.parametrize("pfns", [[1], [899], [3, 5000], [1 << 40]])
def test_what_is_not_to_come(pfns):
    """A page that the other end has must not be sent: it would be an old one."""
    wire = Wire()
    with pytest.raises(ValueError, match="wants pages that it has"):
        wire.left_out.send_wanted(np.array(pfns))
    assert wire.order == []


def test_frames_that_are_not_held_any_more():
    """They may be another guest's: nothing of them leaves."""
    wire = Wire()
    wire.left_out.send_more()
    wire.held = False
    with pytest.raises(GuestStateError):
        wire.left_out.send_more()
    with pytest.raises(GuestStateError):
        wire.left_out.send_wanted(np.array([600]))
    assert wire.order == PFNS[:64].tolist()
    assert wire.let_go == [MFNS[64:128].tolist(), [MFNS[200]]]  # or they would be holes no more


def test_a_slow_wire():
    """With --bandwidth less goes at once, so that what is asked for waits for less."""
    wire = Wire(bandwidth=1 << 20)
    wire.left_out.send_more()
    assert len(wire.order) == 5


def test_nothing_left_out():
    """A guest that wrote nothing meanwhile."""
    left_out = LeftOut(None, PFNS[:0], MFNS[:0], None, None, lambda event: None)
    assert not left_out.send_more()
    with pytest.raises(ValueError, match="wants pages"):
        left_out.send_wanted(np.array([0]))
