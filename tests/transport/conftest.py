"""Two machines that are one: the far one has a home of its own, and is reached through sshd."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.conftest import end_processes, make_home
from tests.flows.flow import MIB
from tests.transport.sshd import Sshd, far_command
from xsave.host.host import Host, add_host
from xsave.host.ssh import add_ssh_host


@pytest.fixture(scope="session")
def sshd(tmp_path_factory):
    """One server for all tests."""
    server = Sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.stop()


@pytest.fixture
def ssh_path(sshd, monkeypatch, tmp_path):
    """The directory of PATH in which `ssh` is found; a test may put another one there."""
    own = tmp_path / "bin"
    shutil.copytree(sshd.bin, own)
    monkeypatch.setenv("PATH", f"{own}:{os.environ['PATH']}")
    return own


@pytest.fixture
def far_home():
    """The other machine's home."""
    home = make_home()
    yield home
    end_processes(home)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def far(far_home, xsave_home):
    """The other machine's host, 64 MiB, as one sees it there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XSAVE_HOME", str(far_home))
        return Host(add_host("localhost", 64 * MIB, seed=3).directory)


@pytest.fixture
def far_options(far, far_home):
    """What `xsave host add` is told of it."""
    return ["--ssh", "far", "--command", far_command(far_home)]


@pytest.fixture
def by_ssh(far, far_home, ssh_path):
    """The other machine's host as one sees it from here."""
    return add_ssh_host("far", "far", far_command(far_home))


@pytest.fixture
def host(xsave_home):
    """Our host."""
    return add_host("localhost", 64 * MIB, seed=9)
