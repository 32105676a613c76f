"""The command: the quick matrix is what is claimed, a point is shown, random moments are clean."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.torture.conftest import DIRTY, SETTINGS
from xsave.torture import random
from xsave.torture.settings import Cell

KEYS = ["preempt", "freezer", "stop_machine", "vcpus", "points", "stale", "guest_failed"]


@pytest.mark.slow
def test_the_quick_matrix(xsave):
    """All 24 cells, in order, each as claimed: exit code 0."""
    cells = json.loads(xsave("torture", "--quick", "--json", timeout=600).out)
    assert all(list(cell)[:7] == KEYS for cell in cells)
    assert len({tuple(cell[key] for key in KEYS[:4]) for cell in cells}) == len(cells) == 24
    assert all(cell["points"] > 0 and cell["as_claimed"] for cell in cells)
    for cell in cells:
        dirty = cell["stale"] or cell["guest_failed"]
        assert bool(dirty) is not cell["claimed_clean"]


def test_a_cell_that_is_not_as_claimed(xsave, held_point):
    """One point of a cell that must not be clean, and it is clean: 6, and the cell is named."""
    arguments = ["--preempt", "full", "--freezer", "off", "--stop-machine", "on", "--vcpus", 1]
    result = xsave("torture", *arguments, "--max-points", 1, "--seed", 3, "--jobs", 1)
    clean = "yes" not in result.out.decode().splitlines()[1].split()
    assert result.code == (6 if clean else 0)
    assert (DIRTY.name in result.err) is clean


def test_at(xsave, held_point):
    """The code with the boundary marked, the register that holds the number, where it was found."""
    out = xsave.ok("torture", "--at", f"{DIRTY.name}/v0/{held_point}").out.decode()
    assert out.count("\n-> ") == 1
    assert "** a frame number in r" in out
    assert "stale in stack: mmtest/" in out
    assert "\nthe guest: " in out


@pytest.mark.parametrize("at", ["full-off-on-1", "nonsense", "full-off-on-1/v7/1"])
def test_at_nothing(xsave, at):
    """A name that is no point's is a usage error."""
    result = xsave("torture", "--at", at)
    assert result.code == 2
    assert "no point" in result.err or "no cell" in result.err


@pytest.mark.slow
def test_random_moments_are_clean():
    """A busy guest with four vCPUs: clean at any moment, and the same whatever tries it."""
    cell = Cell("full", freezer=True, stop_machine=True, vcpus=4)
    found = [random.suspends(cell, dataclasses.replace(SETTINGS, jobs=n), 12) for n in (1, 3)]
    assert found[0] == found[1]
    assert found[0]["fates"] == {"fine": 12}
    assert (found[0]["points"], found[0]["stale"], found[0]["guest_failed"]) == (12, 0, 0)
