"""A host's small files are whole at any moment, whoever is killed while they are written."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import threading

import pytest

from xsave.errors import ConnectionLost
from xsave.host import host, registry
from xsave.host.handover.journal import Journals
from xsave.host.handover.status import copy_of
from xsave.host.handover.table import TARGET
from xsave.host.registry import replace_text


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def kill_at(monkeypatch, nth):
    """Die at the nth system call that opens, writes or renames."""
    calls = 0

    def dying(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise Killed
            return real(*arguments, **options)

        return call

    def half_write(path, text):
        with path.open("w"):  # truncated
            pass
        dying(lambda: None)()
        path.open("w").write(text)

    monkeypatch.setattr(pathlib.Path, "write_text", half_write)
    monkeypatch.setattr(pathlib.Path, "rename", dying(pathlib.Path.rename))


@pytest.mark.parametrize("nth", [1, 2])
def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch, nth):
    """Killed at any step, replace_text leaves the text before."""
    path = tmp_path / "file"
    path.write_text("old")
    with monkeypatch.context() as patched:
        kill_at(patched, nth)
        with pytest.raises(Killed):
            replace_text(path, "new")
    assert path.read_text() == "old"
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_host_survives_a_registration_that_is_killed(xsave_home, monkeypatch, nth):
    """Whatever file it was about to write, the next domain registers, and domids go up."""
    monkeypatch.setattr(registry, "_DYING_WAIT_S", 0.0)  # the lock of the killed is ours still
    localhost = host.open_host("localhost")
    domid, directory, lock = localhost.register("first")
    os.close(lock)
    shutil.rmtree(directory)
    with monkeypatch.context() as patched:
        kill_at(patched, nth)
        with pytest.raises(Killed):
            localhost.register("second")
    next_domid, _, lock = localhost.register("second")
    os.close(lock)
    assert next_domid > domid


def test_a_copy_on_its_way_out_is_waited_for(xsave_home):
    """Its process has removed its socket and lives a moment longer: there is no copy, which is no
    error. One that is not given up and does not answer is one."""
    here = host.open_host("localhost")
    domid, directory, lock = here.register("g")
    with Journals(here.directory).begin(TARGET, "0123abcd", "g", "b") as journal:
        entry = journal.note(domid=domid)
    with pytest.raises(ConnectionLost):
        copy_of(here, entry)
    (directory / "dying").touch()
    timer = threading.Timer(0.2, os.close, [lock])
    timer.start()
    assert copy_of(here, entry) is None
    assert not registry.alive(directory)
    timer.join()


def test_who_is_on_the_way_out_is_waited_for_and_reaped(xsave_home):
    """The next domain has the room of one whose process is about to end."""
    here = host.open_host("localhost")
    _, directory, lock = here.register("g")
    (directory / "dying").touch()
    timer = threading.Timer(0.2, os.close, [lock])
    timer.start()
    here.settle()
    assert not directory.exists()
    timer.join()


def test_a_file_system_too_small_for_a_host(xsave, tmp_path, monkeypatch):
    """7, with what is needed and what there is; nothing is left. A smaller host fits."""
    home = tmp_path / "small"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", home]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    monkeypatch.setenv("XSAVE_HOME", str(home))
    try:
        result = xsave("list")
        assert result.code == 7
        assert "a machine of 8192 MiB need 21 MiB and there are 12 MiB left" in result.err
        assert list((home / "hosts").iterdir()) == []
        xsave.ok("host", "add", "localhost", "--memory", "4G")
        assert xsave("list").code == 0
    finally:
        subprocess.run(["umount", "-l", home], check=True)
