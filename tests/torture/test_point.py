"""One point: what is told of it, and what replaying it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.conftest import DIRTY, SETTINGS
from xsave.errors import HostCannotTake, UsageError
from xsave.torture import forks
from xsave.torture.laboratory import A_FIRST
from xsave.torture.point import FAILED, LUCK, attempt
from xsave.torture.refusals import Refusals
from xsave.torture.replay import replay
from xsave.torture.settings import Sweep
from xsave.torture.stale import STACK
from xsave.torture.symbols import read_symbols
from xsave.torture.worker import points_of

SWEEP = Sweep(DIRTY, 0)


def test_a_stale_point(held_point):
    """Preempted with an entry in a register: it is on the thread's stack in the image, and the
    replay shows the instruction, the register and the place."""
    found = replay(SWEEP, held_point, SETTINGS)
    assert found.point.index == held_point
    assert [line.name for line in found.code if line.here] == [found.name]
    assert found.name.startswith("set_entry+")
    stale = found.outcome.stale[0]
    assert stale.kind == STACK
    assert stale.where.startswith("mmtest/")
    assert "saved" in stale.where
    assert stale.value in found.held.values()
    assert found.outcome.fate in {*FAILED, LUCK}


def test_a_clean_point(lab):
    """At the entry of mm_init no number is in anybody's hands yet."""

    def first():
        for point in points_of(lab, SWEEP, {0}):
            return lab.held(), attempt(lab, {}), lab.symbols.name(point.rip)
        return None

    held, outcome, name = forks.in_child(first)
    assert (held, outcome.stale, outcome.fate, name) == ({}, (), "fine", "mm_init+0x0")


def test_the_same_image_has_one_future(lab):
    """What became of an image is not tried again."""

    def twice():
        outcome = forks.in_child(lambda: attempt(lab, {}))
        return outcome, attempt(lab, {outcome.image: ("check", "remembered")})

    first, second = forks.in_child(twice)
    assert first.image == second.image
    assert (second.fate, second.detail) == ("check", "remembered")


@pytest.mark.slow
def test_no_such_point():
    """Behind the end of the window there is nothing to replay."""
    with pytest.raises(UsageError, match="no point"):
        replay(SWEEP, 1 << 40, SETTINGS)


def test_a_foreign_frame_is_refused(lab):
    """A frame number of A is another domain's on B: the hypervisor says no, and is heard."""

    def restored():
        lab.request_suspend()
        lab.run_to_suspend()
        _door, _clockwork, refusals = lab.restore(lab.image())
        hv = refusals._hv
        va, stale = 0xFFFF_8800_0007_0000, (A_FIRST + 5) << 12 | 0x67
        harmless = hv.call(14, va, 0, 0, 0, 0)
        before = (refusals.refused, refusals.foreign)
        refused = hv.call(14, va, stale, 0, 0, 0)
        return harmless, before, refused, refusals.refused, refusals.foreign

    harmless, before, refused, nr_refused, nr_foreign = forks.in_child(restored)
    assert (harmless, before) == (0, (0, 0))
    assert refused < 0
    assert (nr_refused, nr_foreign) == (1, 1)


def test_other_domains_memory_is_watched(lab):
    """One word changed in a frame of the other domain, or a reference taken, is noticed."""

    def harm(column):
        assert lab.other_domain_is_unharmed()
        if column:
            lab.b.type_count[A_FIRST + 3] += 1
        else:
            lab.b.mem[A_FIRST + 3, 100] = 1
        return lab.other_domain_is_unharmed()

    assert forks.in_child(lambda: harm(column=False)) is False
    assert forks.in_child(lambda: harm(column=True)) is False


def test_a_kernel_without_symbols(lab):
    """Nothing can be known of a kernel that does not say where its page-table paths are."""
    data = bytearray(Path(SETTINGS.kernel).read_bytes())
    at = data.index(b"__pgtable_text_start")
    data[at : at + 2] = b"xx"
    with pytest.raises(HostCannotTake, match="__pgtable_text_start"):
        read_symbols(bytes(data), "kernel")


def test_refusals_listen_to_the_right_calls(lab):
    """mmu_update, update_va_mapping, mmuext_op and set_gdt: what can name a frame."""
    hv = lab.door.xen

    def listened():
        before = dict(hv.table)
        Refusals(hv, A_FIRST, 1)
        return {nr for nr in before if hv.table[nr] is not before[nr]}

    assert forks.in_child(listened) == {1, 2, 14, 26}
