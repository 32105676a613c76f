"""The distribution's kernels and the ramdisk, as fixtures.

XSAVE_DISTRO_KERNELS names a directory of vmlinuz-* and a static busybox; tests/distro/fetch fills
one from Debian's archive.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import directory_named_by
from tests.distro.initramfs import initramfs
from tests.distro.linux import MIB, kernels
from xsave.host.host import add_host


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


@pytest.fixture(scope="session")
def probes(tmp_path_factory):
    """probe.c for 64 and for 32 bits: {name in the ramdisk: content}."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    directory = tmp_path_factory.mktemp("probes")
    source = Path(__file__).with_name("probe.c")
    flags = "-O1 -msse2 -mno-red-zone -nostdlib -static -fno-pie -no-pie -fno-stack-protector"
    flags += " -fcf-protection=none -fno-asynchronous-unwind-tables"
    built = {}
    for bits in (64, 32):
        out = directory / f"probe{bits}"
        command = [compiler, f"-m{bits}", *flags.split(), "-o", str(out), str(source)]
        subprocess.run(command, check=True, timeout=120)
        built[out.name] = out.read_bytes()
    return built


@pytest.fixture(scope="module")
def probing_ramdisk(directory, probes, tmp_path_factory):
    """The ramdisk with the probes, and with a busybox of 32 bits if there is one."""
    programs = dict(probes)
    if (directory / "busybox32").is_file():
        programs["busybox32"] = (directory / "busybox32").read_bytes()
    path = tmp_path_factory.mktemp("ramdisk") / "initrd"
    path.write_bytes(initramfs((directory / "busybox").read_bytes(), programs))
    return str(path)


@pytest.fixture
def host(xsave_home):
    return add_host("a", 512 * MIB, seed=3)
