"""Which points are tried, what they are called, and what is claimed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.torture.conftest import SETTINGS
from xsave.errors import UsageError
from xsave.torture.plan import choose
from xsave.torture.settings import Cell, Sweep, claimed_clean, parse_point

RIPS = np.array([1, 2, 3, 2, 3, 2, 3, 4, 1, 2, 5] * 9, np.uint64)
DEPTHS = np.array([0, 0, 8, 8, 8, 0, 16, 0, 0, 0, 0] * 9, np.uint64)


def chosen(limit, **changes):
    return choose(RIPS, DEPTHS, dataclasses.replace(SETTINGS, **changes), limit).tolist()


def test_no_limit_is_every_point():
    """0, and every=1, try all; a limit above their number too."""
    assert chosen(0) == chosen(0, every=1) == chosen(1000) == list(range(RIPS.size))


@pytest.mark.parametrize("limit", [5, 6, 20, 98])
def test_a_sample_leaves_out_no_instruction(limit):
    """Down to one point for each instruction, all are in a sample, and it is as large as told."""
    sample = chosen(limit)
    assert len(sample) == len(set(sample)) == limit
    assert set(RIPS[sample].tolist()) == set(RIPS.tolist())
    assert sample == sorted(sample)


def test_a_sample_of_instructions():
    """Below that it is a sample of the instructions, each at its first boundary."""
    assert set(chosen(3)) <= {0, 1, 2, 7, 10}
    assert len(chosen(3)) == 3


def test_every_nth_point_and_every_instruction():
    """every=N takes the multiples of N and the first boundary of each instruction."""
    assert chosen(0, every=30) == [0, 1, 2, 7, 10, 30, 60, 90]


def test_the_seed_decides():
    """The same seed gives the same sample, another one another."""
    assert chosen(40) == chosen(40)
    assert chosen(40) != chosen(40, seed=2)


def test_names():
    """A point's name leads back to its sweep and number."""
    cell = Cell("voluntary", freezer=True, stop_machine=False, vcpus=2)
    assert cell.name == "voluntary-on-off-2"
    assert Cell.parse(cell.name) == cell
    for sweep in cell.sweeps():
        assert parse_point(f"{sweep.name}/12") == (sweep, 12)
    assert len({sweep.name for sweep in cell.sweeps()}) == len(cell.sweeps()) > 2
    assert Cell.parse("full-off-on-1").sweeps() == [Sweep(Cell.parse("full-off-on-1"), 0)]


@pytest.mark.parametrize(
    "text", ["", "full", "full-off-on-1", "full-off-on-1/v1/3", "half-off-on-1/v0/3",
             "full-off-on-1/v0/x", "full-off-1/v0/3"],
)  # fmt: skip
def test_no_point(text):
    """What names no point is a usage error."""
    with pytest.raises(UsageError):
        parse_point(text)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("full-off-off-1", False), ("full-off-on-1", False), ("full-on-on-1", True),
        ("full-on-off-2", True), ("none-off-on-2", True), ("none-off-off-2", False),
        ("none-off-off-1", True), ("voluntary-off-off-2", False), ("voluntary-off-on-2", True),
    ],
)  # fmt: skip
def test_the_claim(name, clean):
    """The freezer always; stop_machine, or a single vCPU, without preemption; else nothing."""
    assert claimed_clean(Cell.parse(name)) is clean
