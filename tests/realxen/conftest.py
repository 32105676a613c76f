"""Real Xens for the tests of this directory, which are only collected where XSAVE_REALXEN names
the versions: `make test-realxen`, `make test-realxen XEN="4.14 4.17 4.20"`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from tests.realxen import dom0, packages
from tests.realxen.machine import RealXen, Silent

#: QEMU's CPU models under test: qemu64's features any host has.
CPU = "qemu64"
#: So many machines are started for a version, if those before stop.
MACHINES = 4


def versions():
    return os.environ.get("XSAVE_REALXEN", "").split()


def pytest_ignore_collect(collection_path, config):
    """Nothing of this is part of the ordinary test run."""
    return None if versions() else collection_path.name.startswith("test_") or None


class Machines:
    """Real Xens of a version, one at a time."""

    def __init__(self, boot, factory, version):
        self.version = version
        self._boot, self._factory = boot, factory
        self._machine = None
        self._nr_started = 0

    def running(self):
        """Return the machine that runs: another one if the last has stopped, but not for ever."""
        if self._machine and self._machine.running:
            return self._machine
        while self._nr_started < MACHINES:
            self._nr_started += 1
            directory = self._factory.mktemp(f"xen-{self.version}-{self._nr_started}")
            try:
                self._machine = RealXen(self._boot, directory, self.version, CPU)
            except Silent as why:
                warnings.warn(f"another machine is started: {why}", stacklevel=1)
            else:
                return self._machine
        pytest.fail(f"{self._nr_started} machines with a real Xen {self.version} have stopped")

    def stop(self):
        if self._machine:
            self._machine.stop()


@pytest.fixture(scope="session", params=versions())
def real_xens(request, tmp_path_factory):
    """Real Xens of one version; skipped, with the reason, where its packages cannot be had."""
    version = request.param
    if version not in packages.SUITES:
        pytest.fail(f"XSAVE_REALXEN: no Xen {version}; known: {', '.join(packages.SUITES)}")
    try:
        packages.require_tools()
        cache = Path(request.config.cache.mkdir(f"realxen-{version}"))
        boot = dom0.build(cache, version)
    except packages.Unavailable as reason:
        pytest.skip(f"a real Xen {version} cannot be had: {reason}")
    machines = Machines(boot, tmp_path_factory, version)
    yield machines
    machines.stop()
