"""The distribution's kernels and the ramdisk, as fixtures.

XSAVE_DISTRO_KERNELS names a directory of vmlinuz-* and a static busybox; tests/distro/fetch fills
one from Debian's archive.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import directory_named_by
from tests.distro.initramfs import initramfs
from tests.distro.linux import MIB
from xsave.host.host import add_host


def kernels():
    """Return the kernels there are to test, none if there is no directory."""
    directory = Path(os.environ.get("XSAVE_DISTRO_KERNELS", "/nonexistent"))
    return sorted(path.name for path in directory.glob("vmlinuz-*")) or ["none"]


@pytest.fixture(scope="module")
def directory():
    return directory_named_by("XSAVE_DISTRO_KERNELS")


@pytest.fixture(params=kernels())
def kernel(request, directory):
    """Each kernel in turn."""
    if request.param == "none":
        pytest.skip(f"no vmlinuz-* in {directory}")
    return str(directory / request.param)


@pytest.fixture(scope="module")
def ramdisk(directory, tmp_path_factory):
    if not (directory / "busybox").is_file():
        pytest.skip(f"no static busybox in {directory}")
    path = tmp_path_factory.mktemp("ramdisk") / "initrd"
    path.write_bytes(initramfs((directory / "busybox").read_bytes()))
    return str(path)


@pytest.fixture
def host(xsave_home):
    return add_host("a", 512 * MIB, seed=3)
