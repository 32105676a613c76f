"""--connections: the image of a migration goes over several connections at once."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.conftest import Xsave
from tests.flows.flow import MIB, create, nothing_is_left, runs_on, state, wait_for, wait_for_tick
from tests.flows.live import Oracle, migrate_live
from xsave.errors import StorageError, UsageError
from xsave.host.host import Host, add_host
from xsave.host.receivers import ProcessReceiver, open_target
from xsave.progress import Round

HEAVY = "touch=1M write=4M rate=40M rest=2"


@pytest.fixture
def there(xsave_home):
    """Another host of this machine."""
    return add_host("b", 64 * MIB, seed=4)


@pytest.fixture
def guest(host):
    """A heavy writer."""
    create(host, memory_bytes=16 * MIB, cmdline=HEAVY, vcpus=2)
    wait_for_tick(host)


def is_the_same(host, target, seen: Host, monkeypatch, **options):
    """Migrate over four connections; page for page it is what it was, and runs on."""
    oracle = Oracle(monkeypatch, seen)
    result = migrate_live(host, target, nr_connections=4, **options)
    assert oracle.found.different == ()
    assert state(host) is None
    nothing_is_left(host)
    runs_on(seen)
    assert not list(seen.directory.glob("join-*"))
    return result


@pytest.mark.parametrize(
    "options", [{}, {"compress_level": 1}, {"live": False}, {"bandwidth": 2e7}]
)
def test_pipes(host, guest, there, monkeypatch, options):
    """To a host of this machine: live, compressed, suspended first, held back."""
    is_the_same(host, there, there, monkeypatch, **options)


def test_ssh(host, guest, far, by_ssh, monkeypatch):
    """Each connection is an ssh of its own; empty pages take no bytes, as with one."""
    events = []
    result = is_the_same(host, by_ssh, far, monkeypatch, report=events.append)
    first = next(event for event in events if isinstance(event, Round))
    assert first.nr_bytes < (first.nr_pages - 1500) * 4096
    assert result.guest_downtime_ns != result.downtime_ns


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_sockets(host, guest, there, xsave_home, tmp_path, monkeypatch, kind):
    """All connections are made to the one address."""
    where = {"tcp": "tcp:127.0.0.1:0", "unix": f"unix:{tmp_path}/socket"}[kind]
    listen = ["migrate-receive", "--listen", where, "--json"]
    with Xsave(xsave_home).start("--host", "b", *listen) as process:
        address = json.loads(process.stdout.readline())["listening"]
        is_the_same(host, open_target(address), there, monkeypatch)
        assert process.wait(20) == 0


def test_the_command(xsave_home, host, guest, there):
    """migrate --connections."""
    xsave = Xsave(xsave_home)
    xsave.ok("migrate", "g", "--to", "b", "--connections", 3)
    runs_on(there)
    for wrong in (0, 17):
        assert xsave("--host", "b", "migrate", "g", "--to", "x", "--connections", wrong).code == 2


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("after", [1, 3])
def test_one_of_them_is_killed(host, guest, far, by_ssh, monkeypatch, number, after):
    """Any ssh, in any round: the guest goes on here, nothing is left there."""
    pids = []
    begin = ProcessReceiver.__init__

    def begin_and_tell(self, *arguments, **options):
        begin(self, *arguments, **options)
        pids.extend(process.pid for process in self._processes)

    monkeypatch.setattr(ProcessReceiver, "__init__", begin_and_tell)

    def report(event):
        if isinstance(event, Round) and event.number == after:
            os.kill(pids[number], signal.SIGKILL)

    with pytest.raises(StorageError, match="the guest goes on here"):
        migrate_live(host, by_ssh, nr_connections=4, report=report)
    assert len(pids) == 4
    runs_on(host)
    wait_for(lambda: not far.records())
    nothing_is_left(far)


def test_the_complaint_comes_back(host, guest, there):
    """What the one with the conversation says."""
    create(there, "other", memory_bytes=56 * MIB)
    with pytest.raises(StorageError, match=r"the receiving end said: host b has \d+ free frames"):
        migrate_live(host, there, nr_connections=3)
    runs_on(host)


def test_nothing_for_a_real_xl(host, guest, there):
    """Refused before anything starts."""
    with pytest.raises(UsageError, match="one connection"):
        migrate_live(host, open_target("xl:cat"), nr_connections=2)
    runs_on(host)
