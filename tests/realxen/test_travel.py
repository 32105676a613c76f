"""Images travel both ways between xsave and a real Xen, and the guests do not notice."""

from __future__ import annotations

import re

import pytest

from tests.realxen.travelling import Journey, builtin, linux

KINDS = ["builtin", "linux"]


@pytest.fixture
def kind(request):
    """The kernel to travel with."""
    if request.param == "builtin":
        return builtin()
    return linux(request.getfixturevalue("micro_linux"))


@pytest.fixture
def journey(xsave, real_xen, tmp_path, request):
    """A guest with a name of its own."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name).strip("-")
    journey = Journey(xsave, real_xen, tmp_path, name)
    yield journey
    journey.clean_up()


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_from_xsave_to_xen_and_back(journey, kind, vcpus):
    """Booted in xsave, restored by the real xl, saved by it, restored in xsave, and once more."""
    journey.create_here(kind, vcpus)
    journey.restore_there(journey.save_here())
    journey.restore_here(journey.save_there())
    journey.restore_there(journey.save_here())
    journey.save_there()


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_from_xen_to_xsave_and_back(journey, kind, vcpus):
    """Booted by the real xl, saved by it, restored in xsave, and back."""
    journey.create_there(kind, vcpus)
    journey.restore_here(journey.save_there())
    journey.restore_there(journey.save_here())
    journey.save_there()
