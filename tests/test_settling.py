"""The p2m's pages, written ahead: in the end they say where the frames are, whatever came since."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.test_placing import StandIn, batch
from xsave.canonical import local_p2m
from xsave.placing import Memory
from xsave.settling import Settler

SIZE = 1500
P2M_PAGES = [3, 4, 5]


class Door(StandIn):
    """A domctl whose process touches what it is asked to."""

    def touch(self, mfns):
        assert (mfns != 0).all()


@pytest.mark.parametrize("since", [[], [(4, 9)], [(700, 1)], [(1400, None)], [(3, 9), (1499, 1)]])
def test_the_p2m_written_ahead(since):
    """A p2m page that comes again, a pfn that gets its frame late, one that is given up."""
    door = Door()
    memory = Memory(door, SIZE, live=True)
    settler = Settler(door, memory, SimpleNamespace(p2m_frames=np.array(P2M_PAGES, np.uint64)))
    late = {pfn for pfn, _ in since} - set(P2M_PAGES) - {1400}
    first = [(pfn, None if pfn in late else 1) for pfn in range(SIZE)]
    memory.place(batch(first), None, 0)
    while settler.work_ahead():
        pass
    assert not (memory.moved.any() or memory.came[P2M_PAGES].any())
    if since:
        memory.place(batch(since), None, 0)
    memory.drop(memory.holes())
    memory.complete()
    settler._write_p2m()
    found = door.machine.mem[memory.p2m[P2M_PAGES].astype(np.intp)]
    assert np.array_equal(found, local_p2m(memory.p2m))
