"""Real Xens for the tests of this directory, which are only collected where XSAVE_REALXEN names
the versions: `make test-realxen`, `make test-realxen XEN="4.14 4.17 4.20"`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.realxen import dom0, packages
from tests.realxen.machine import RealXen

#: QEMU's CPU models under test: qemu64's features any host has.
CPU = "qemu64"


def versions():
    return os.environ.get("XSAVE_REALXEN", "").split()


def pytest_ignore_collect(collection_path, config):
    """Nothing of this is part of the ordinary test run."""
    return None if versions() else collection_path.name.startswith("test_") or None


@pytest.fixture(scope="session", params=versions())
def real_xen(request, tmp_path_factory):
    """A running real Xen; skipped, with the reason, where its packages cannot be had."""
    version = request.param
    if version not in packages.SUITES:
        pytest.fail(f"XSAVE_REALXEN: no Xen {version}; known: {', '.join(packages.SUITES)}")
    try:
        packages.require_tools()
        cache = Path(request.config.cache.mkdir(f"realxen-{version}"))
        boot = dom0.build(cache, version)
    except packages.Unavailable as reason:
        pytest.skip(f"a real Xen {version} cannot be had: {reason}")
    xen = RealXen(boot, tmp_path_factory.mktemp(f"xen-{version}"), version, CPU)
    yield xen
    xen.stop()
