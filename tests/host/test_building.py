"""What a domain's process tells a guest before its first instruction."""

from __future__ import annotations

import itertools
import socket
from types import SimpleNamespace

import numpy as np
import pytest

from tests.flows.flow import MIB
from tests.guest.pagetable_model import recount
from tests.guest.rig import FULL
from xsave.errors import HostCannotTake
from xsave.guest.xen.pagetypes import (
    PGT_L1,
    PGT_L2,
    PGT_L3,
    PGT_L4,
    PGT_NONE,
    PGT_WRITABLE,
)
from xsave.guest.xen.wire import pack_blobs
from xsave.host.building import Building
from xsave.host.control import Client, Request
from xsave.host.host import add_host


@pytest.fixture
def begin(xsave_home, tmp_path):
    """begin(target_pages) makes an empty domain; returns (its Building, what is running)."""
    host = add_host("a", 64 * MIB, seed=3)
    running = SimpleNamespace(
        hypervisor=None,
        machine=host.machine,
        domid=1,
        name="g",
        directory=tmp_path,
        control=SimpleNamespace(console_output=print, resume_input=print),
        disk_done=print,
        have=lambda _buffers: True,
        forget_code=print,
        forget_cpu=lambda: None,
    )
    ours, _theirs = socket.socketpair()

    def begin(target_pages):
        building = Building(running)
        arguments = {"nr_vcpus": 1, "max_pages": 256, "target_pages": target_pages}
        building.op_begin(Request(Client(ours), "begin", arguments))
        running.domain = running.hypervisor.domain
        return building, running

    return begin


@pytest.mark.parametrize("target", [200, 256])
def test_the_target_of_a_balloon_is_in_xenstore(begin, target):
    """A guest that was ballooned finds the target it had, not its maximum: it would grow."""
    _, running = begin(target)
    domain = running.domain
    read = [domain.store.read(f"{domain.home}/memory/{node}") for node in ("target", "static-max")]
    assert read == [str(4 * target).encode(), b"1024"]


class Tables:
    """A guest's page tables, an L4 that leads to a page, and an odd L1 that maps one of them."""

    def __init__(self, running):
        frames = running.machine.allocate(running.domid, 6).tolist()
        self.l4, self.l3, self.l2, self.l1, self.page, self.odd = self.frames = frames
        self.machine = running.machine
        for table, target in itertools.pairwise(frames[:5]):
            self.machine.mem[table, 5] = target << 12 | FULL
        self.machine.mem[self.odd, 7] = self.l2 << 12 | FULL

    def request(self, mfns, levels, *, own, ahead=()):
        raw = np.array(mfns, np.uint64), np.array(levels, np.uint8)
        flags, ahead = np.isin(mfns, own), np.array(ahead, np.uint64)
        parts = (*raw, flags, ahead)
        return Request(None, "pin", {}, pack_blobs(*(part.tobytes() for part in parts)))

    def check(self):
        """The L4 is pinned, and all is as its entries say."""
        pinned = [mfn for mfn in self.frames if self.machine.pinned[mfn]]
        assert pinned == [self.l4]
        types = [PGT_L4, PGT_L3, PGT_L2, PGT_L1, PGT_WRITABLE, PGT_NONE]
        assert self.machine.page_type[self.frames].tolist() == types
        uses, refs = recount(self.machine, self.frames)
        for mfn in self.frames:
            assert self.machine.type_count[mfn] == uses[mfn] + (mfn == self.l4)
            assert self.machine.refs[mfn] == refs[mfn]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_table_that_nobody_uses_is_in_no_guests_way(begin, ahead):
    """An L1 table that is none of the guest's pins maps one of its tables writable: it is pinned
    on the way, or was ahead, and then the guest's own pins count."""
    building, running = begin(256)
    tables = Tables(running)
    mfns, levels = tables.frames[:4], [4, 3, 2, 1]
    if ahead:
        assert running.domain.tables.pin(tables.odd, 1) == 0
    else:
        mfns, levels = [tables.odd, *mfns], [1, *levels]
    early = [tables.odd] if ahead else []
    building.op_pin(tables.request(mfns, levels, own=[tables.l4], ahead=early))
    tables.check()


def test_what_no_pin_of_the_guests_can_have_is_refused(begin):
    """The first of its own tables that is wrong is named, by its pfn; others that are wrong are
    nobody's fault."""
    building, running = begin(256)
    tables = Tables(running)
    running.machine.m2p[tables.frames] = np.arange(40, 46)
    mfns, levels = [tables.odd, *tables.frames[:4]], [4, 4, 3, 2, 1]
    building.op_pin(tables.request(mfns, levels, own=[tables.l4]))
    tables.check()
    with pytest.raises(HostCannotTake, match="pfn 0x2d is no valid table of level 4") as caught:
        building.op_pin(tables.request([tables.odd], [4], own=[tables.odd]))
    assert caught.value.facts["pfn"] == 45
