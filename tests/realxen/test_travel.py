"""Images travel both ways between xsave and a real Xen, and the guests do not notice."""

from __future__ import annotations

import re

import pytest

from tests.conftest import directory_named_by
from tests.distro.initramfs import initramfs
from tests.realxen.travelling import Journey, builtin, debian, linux, once_more
from xsave.host.handshake import BANNER, READY, REPORT, STATUS_OK

KINDS = ["builtin", "linux", "debian"]


@pytest.fixture
def kind(request, tmp_path):
    """The kernel to travel with: ours, a small Linux, or a distribution's as it comes."""
    if request.param == "builtin":
        return builtin()
    if request.param == "linux":
        return linux(request.getfixturevalue("micro_linux"))
    directory = directory_named_by("XSAVE_DISTRO_KERNELS")
    ramdisk = tmp_path / "debian-initrd"
    ramdisk.write_bytes(initramfs((directory / "busybox").read_bytes()))
    return debian(min(directory.glob("vmlinuz-*-cloud-amd64")), ramdisk)


@pytest.fixture
def journey(xsave, real_xens, tmp_path, request):
    """A guest with a name of its own."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name).strip("-")
    journey = Journey(xsave, real_xens, tmp_path, name)
    yield journey
    journey.clean_up()


@once_more
@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_from_xsave_to_xen_and_back(journey, kind, vcpus):
    """Booted in xsave, restored by the real xl, saved by it, restored in xsave, and once more."""
    journey.create_here(kind, vcpus)
    journey.restore_there(journey.save_here())
    journey.restore_here(journey.save_there())
    journey.restore_there(journey.save_here())
    journey.save_there()


@once_more
@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_from_xen_to_xsave_and_back(journey, kind, vcpus):
    """Booted by the real xl, saved by it, restored in xsave, back, and here again: one guest."""
    journey.create_there(kind, vcpus)
    journey.restore_here(journey.save_there())
    journey.restore_there(journey.save_here())
    journey.restore_here(journey.save_there())
    journey.save_here()


@once_more
@pytest.mark.parametrize("kind", ["builtin", "linux"], indirect=True)
def test_to_the_real_receiver(journey, kind):
    """An image of ours and the go-ahead are a migration for `xl migrate-receive`: it says what
    it says to another xl, byte for byte, and the guest goes on there."""
    journey.create_here(kind, 1)
    said = journey.receive_there(journey.save_here())
    assert said == BANNER + READY + REPORT + STATUS_OK
    journey.restore_here(journey.save_there())
    journey.save_here()


@once_more
@pytest.mark.parametrize("kind", ["builtin", "linux"], indirect=True)
def test_from_the_real_sender(journey, kind):
    """What a real, live `xl migrate` sent, its GO message at the end, is an image for
    `xsave restore`, and the guest goes on."""
    journey.create_there(kind, 1)
    journey.restore_here(journey.migrate_there())
    journey.save_here()


@once_more
@pytest.mark.parametrize("kind", ["builtin", "linux"], indirect=True)
def test_live_from_the_real_sender(journey, kind):
    """A real, live `xl migrate` whose other end is `xsave migrate-receive`: it is content with what
    that says, and the guest goes on here. Then back, as an image."""
    journey.create_there(kind, 1)
    journey.migrate_from_there()
    journey.restore_there(journey.save_here())
    journey.save_there()


@once_more
@pytest.mark.parametrize("kind", ["builtin", "linux"], indirect=True)
def test_live_to_the_real_receiver(journey, kind):
    """`xsave migrate --to xl:...`: while the guest runs and counts, its memory goes to the real
    `xl migrate-receive` in rounds; no tick is missed or said twice. Then back, as an image."""
    journey.create_here(kind, 1)
    journey.ticked_here()
    events = journey.migrate_to_there()
    assert events[-1]["outcome"] == "migrated"
    assert events[-1]["nr_rounds"] >= 2
    journey.restore_here(journey.save_there())
    journey.save_here()
