"""Hosts and images that several flow tests start from."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import end_processes, make_home
from tests.flows import flow, forked
from xsave.host.host import add_host


@pytest.fixture(scope="session")
def builtin_image(tmp_path_factory):
    """A saved built-in guest (8 MiB, deterministic, five seconds old, 4 threads)."""
    path = tmp_path_factory.mktemp("builtin") / "img"
    home = make_home()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XSAVE_HOME", str(home))
        host = add_host("maker", 64 * flow.MIB, seed=5)
        flow.create(host, deterministic=7)
        flow.save(host, path)
        end_processes(home)
    shutil.rmtree(home)
    return path


@pytest.fixture
def host(xsave_home):
    """A host of 64 MiB."""
    return add_host("a", 64 * flow.MIB, seed=9)


@pytest.fixture
def target(xsave_home):
    """Another one, where guests go to."""
    return add_host("b", 64 * flow.MIB, seed=4)


@pytest.fixture(scope="module")
def world():
    """A host of 16 MiB and the forked domain processes on it, for all tests of a module."""
    home = make_home()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XSAVE_HOME", str(home))
        forks = forked.Forks(patch)
        yield add_host("a", 16 * flow.MIB, seed=1), forks
        forks.kill()
    end_processes(home)
    shutil.rmtree(home)


@pytest.fixture
def localhost(xsave_home):
    """A small localhost, where the commands look for domains."""
    return add_host("localhost", 64 * flow.MIB, seed=6)


@pytest.fixture
def guest(localhost):
    """The localhost with a guest g that has ticked."""
    flow.create(localhost)
    flow.wait_for_tick(localhost)
    return localhost
