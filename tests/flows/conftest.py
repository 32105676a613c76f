"""Images that several flow tests start from, made once per session."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import end_processes, make_home
from tests.flows import flow
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
