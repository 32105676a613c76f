"""Booting does not depend on luck: the same kernels over and over, on an idle and a busy machine.

    make test-boots BOOTS=50

boots each kernel so many times on one and on two vCPUs, without and with twice as many busy
processes beside it as there are CPUs. The usual run does it once each, with them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from tests.distro.initramfs import initramfs
from tests.distro.over_and_over import KERNELS, PATIENCE_S, boot, busybox, wait_for_tick, well
from tests.flows.flow import MIB, nothing_is_left, state, wait_for
from xsave.host.host import add_host

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

BOOTS = int(os.environ.get("XSAVE_BOOTS", "0"))
LOADS = ["idle", "busy"] if BOOTS else ["busy"]


@contextlib.contextmanager
def load(kind):
    """Keep every CPU twice as busy as it can be, unless idle."""
    nr = 2 * (os.cpu_count() or 1) if kind == "busy" else 0
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(nr)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("vcpus", [1, 2])
def test_every_boot(xsave_home, tmp_path, kernel, vcpus, kind):
    """Each boot reaches user space with all its processors and without a complaint, and ends when
    it is asked to, with nothing left."""
    host, ramdisk = add_host("a", 512 * MIB, seed=3), tmp_path / "initrd"
    ramdisk.write_bytes(initramfs(busybox()))
    with load(kind):
        for _ in range(BOOTS or 1):
            boot(host, kernel, str(ramdisk), vcpus)
            well(wait_for_tick(host, 2), vcpus)
            with host.find("g") as domctl:
                domctl.shutdown("poweroff")
            wait_for(lambda: state(host) is None, PATIENCE_S)
            nothing_is_left(host)
