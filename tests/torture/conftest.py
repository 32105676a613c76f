"""A laboratory for all tests of the torture; a test that lets the guest run does so in a child."""

from __future__ import annotations

from pathlib import Path

import pytest

from xsave.host.create import BUILTIN_KERNEL
from xsave.torture.inmemory import make_directory
from xsave.torture.laboratory import Laboratory
from xsave.torture.settings import Cell, Settings

SETTINGS = Settings(kernel=str(BUILTIN_KERNEL), max_points=6)
#: The cell that must not be clean.
DIRTY = Cell("full", freezer=False, stop_machine=True, vcpus=1)


@pytest.fixture(scope="session")
def lab():
    """A preemptible guest without the freezer, on one vCPU."""
    with make_directory() as directory:
        yield Laboratory(DIRTY, SETTINGS, Path(directory))


@pytest.fixture(scope="session")
def held_point(lab):
    """The number of a point in set_entry at which a register holds a frame number."""
    from xsave.torture import forks

    def find():
        for point in lab.window().walk():
            if lab.held() and lab.symbols.function(point.rip)[0] == "set_entry":
                return point.index
        raise AssertionError("no such point")

    return forks.in_child(find)
