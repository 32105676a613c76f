"""Small machines in shared memory for the tests of the hypervisor."""

from __future__ import annotations

import pytest

from tests.guest.arena import NoCpu
from tests.guest.rig import MIB, Guest, Machines


@pytest.fixture
def machines():
    """Make machines of any size: `machines.make(nr_frames, seed)`; they are gone afterwards."""
    made = Machines()
    yield made
    made.close()


@pytest.fixture
def machine(machines):
    """A machine of 16 MiB."""
    return machines.make(16 * MIB)


@pytest.fixture
def guest(machine):
    """A guest with hand-made page tables."""
    return Guest(machine)


@pytest.fixture
def asking(guest):
    """The same without a CPU, to make hypercalls by hand."""
    guest.hv.cpu = NoCpu(guest.hv)
    guest.hv.q = guest.hv.cpu.q
    return guest


@pytest.fixture
def foreign(machine):
    """A frame of another domain's."""
    return Guest(machine, domid=2).frames[6]


@pytest.fixture(scope="module")
def module_machine():
    """A machine of 16 MiB for all tests of a module, where each example would be too dear."""
    made = Machines()
    yield made.make(16 * MIB)
    made.close()
