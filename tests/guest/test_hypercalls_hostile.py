"""Every hypercall with arguments and structures that nobody sane would pass."""

from __future__ import annotations

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.guest.arena import BASE, SCRATCH_PFN, Arena, attack
from tests.guest.hostile import SHAPES, Attacker
from tests.guest.rig import MIB, Machines, remove
from xsave.guest.xen.hypercalls import table

seeds = st.integers(0, (1 << 64) - 1)


@pytest.fixture(scope="module")
def arena():
    machines = Machines()
    yield Arena(machines.make(16 * MIB))
    machines.close()


def attempt(arena, seed, numbers):
    """Make these calls; check each answer, and at the end what they left."""
    hv = attack(arena.machine)
    attacker = Attacker(arena, hv, seed)
    try:
        for pfn in range(SCRATCH_PFN + 1, SCRATCH_PFN + 6):  # frames free to become anything
            assert hv.call(14, BASE + (pfn << 12), 0, 0, 0, 0) == 0
        for number in numbers:
            attacker.call(number)
        arena.check(hv)
    except BaseException:
        note("\n".join(map(str, attacker.made)))
        raise
    finally:
        remove(hv.domain)


def test_every_family_has_a_shape():
    """No hypercall is left out of these tests."""
    assert set(SHAPES) == set(table())


@settings(max_examples=60)
@given(seeds, st.lists(st.sampled_from(sorted(SHAPES)), min_size=20, max_size=60))
def test_any_calls_are_contained(arena, seed, numbers):
    """Any sequence of any hypercalls: each answer is a number, nothing is raised, no frame, type,
    count or pfn of another's changes, no table is mapped writable, and every count is what the
    tables, the pins and Xen's own uses of the frames add up to."""
    attempt(arena, seed, numbers)


@pytest.mark.parametrize("number", sorted(SHAPES))
def test_each_family_is_contained(arena, number):
    """The same of one hypercall among those that change page tables, over all its commands."""

    @settings(max_examples=6)
    @given(seeds)
    def check(seed):
        attempt(arena, seed, [number, number, 26, number, 1] * 8)

    check()


@given(seeds, st.integers(0, (1 << 64) - 1))
@settings(max_examples=20)
def test_unknown_hypercalls_are_contained(arena, seed, number):
    """Any number is a hypercall or -ENOSYS."""
    attempt(arena, seed, [number])
