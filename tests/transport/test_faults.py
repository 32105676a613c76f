"""What may break on the way, does: the guest goes on at the source, and nothing is left there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Xsave
from tests.flows.flow import MIB, create, nothing_is_left, runs_on, wait_for, wait_for_tick
from tests.flows.live import migrate_live
from tests.transport.sshd import far_command
from xsave.errors import StorageError
from xsave.host import receivers, transport
from xsave.host.handover import sender
from xsave.host.host import Host, add_host
from xsave.host.receivers import SshReceiver, open_target
from xsave.host.ssh import SshHost
from xsave.progress import Round, Stage

HEAVY = "touch=1M write=4M rate=40M rest=2"


@pytest.fixture
def guest(host):
    """A heavy writer on our host."""
    create(host, memory_bytes=16 * MIB, cmdline=HEAVY)
    wait_for_tick(host)


@pytest.fixture
def client(monkeypatch):
    """The pid of the ssh of a migration, once there is one: client[-1]."""
    pids = []
    begin = SshReceiver.__init__

    def begin_and_tell(self, *arguments):
        begin(self, *arguments)
        pids.append(self.pid)

    monkeypatch.setattr(SshReceiver, "__init__", begin_and_tell)
    return pids


def receiver_of(home):
    """Return the pid of the migrate-receive of this home."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if (
            b"migrate-receive" in command
            and b"XSAVE_HOME=" + os.fsencode(home) in environment
            and b"ssh" not in command[0]
        ):
            return int(entry.name)
    raise AssertionError("no receiver")


#: When something breaks: in the middle of the rounds; once the guest is suspended and all is sent.
MOMENTS = {
    "round": lambda event: isinstance(event, Round) and event.number == 2,
    "hand-over": lambda event: isinstance(event, Stage) and event.name == "hand over",
}
at_any_moment = pytest.mark.parametrize("moment", MOMENTS)


def fails_at(moment, host, target, act):
    """Migrate, `act` at that moment; the migration must fail and the guest go on."""
    acted = []

    def report(event):
        if not acted and MOMENTS[moment](event):
            acted.append(event)
            act()

    with pytest.raises(StorageError, match="the guest goes on here") as caught:
        migrate_live(host, target, report=report)
    assert acted
    runs_on(host)
    return str(caught.value)


def nothing_is_left_soon(far):
    """The far end may need a moment to see that it is alone."""
    wait_for(lambda: not far.records())
    nothing_is_left(far)


@at_any_moment
def test_ssh_is_killed(host, guest, far, by_ssh, client, moment):
    """With SIGKILL."""
    fails_at(moment, host, by_ssh, lambda: os.kill(client[-1], signal.SIGKILL))
    nothing_is_left_soon(far)


@at_any_moment
def test_the_receiver_is_killed(host, guest, far, far_home, by_ssh, client, moment):
    """migrate-receive itself, with SIGKILL; the domain it was building sees that."""
    fails_at(moment, host, by_ssh, lambda: os.kill(receiver_of(far_home), signal.SIGKILL))
    nothing_is_left_soon(far)


@at_any_moment
def test_the_link_is_dead(host, guest, far, by_ssh, client, monkeypatch, moment):
    """ssh is there, but nothing passes: after the time-out the guest goes on. Once ssh is
    gone, too, so is the copy."""
    monkeypatch.setattr(transport, "STALL_TIMEOUT_S", 1.0)
    monkeypatch.setattr(sender, "READY_TIMEOUT_S", 1.0)
    monkeypatch.setattr(receivers, "_EXIT_WAIT_S", 0.5)
    said = fails_at(moment, host, by_ssh, lambda: os.kill(client[-1], signal.SIGSTOP))
    assert "1 s" in said
    nothing_is_left_soon(far)


def test_a_sender_that_says_nothing(far, far_home, monkeypatch, tmp_path):
    """The receiver does not wait for ever either."""
    script = (
        "import sys; from xsave import receive; receive.SILENCE_TIMEOUT_S = 0.5\n"
        "from xsave.cli import main; sys.argv[0] = 'xsave'; main()"
    )
    monkeypatch.setenv("XSAVE_HOME", str(far_home))
    reading, writing = os.pipe()
    with Xsave(far_home).start("list", stdin=reading) as warm:
        warm.communicate()
    done = subprocess.run(
        [sys.executable, "-c", script, "migrate-receive"],
        stdin=reading, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(reading)
    os.close(writing)
    assert done.returncode == 7
    assert b"nothing has come for 0.5 s" in done.stderr
    nothing_is_left(far)


def test_no_frames_there(host, guest, far_home, by_ssh):
    """The far machine is too small: its own words, and the guest goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XSAVE_HOME", str(far_home))
        small = Host(add_host("small", 12 * MIB).directory)
    target = SshHost("far", "far", by_ssh.command, "small")
    with pytest.raises(StorageError, match=r"said: host small has \d+ free frames"):
        migrate_live(host, target)
    runs_on(host)
    nothing_is_left(small)


@pytest.fixture
def tiny_home(tmp_path):
    """A home on a file system of 20 MiB."""
    home = tmp_path / "tiny"
    home.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(home)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system, and not everywhere")
    yield home
    subprocess.run(["umount", "-l", str(home)], check=True)


@pytest.mark.parametrize(
    ("host_memory", "match"),
    [
        ("64M", r"said: .*the domain needs 16 MiB .* and there are \d+ MiB left"),
        (None, r"said: .*the tables of a machine of 8192 MiB need 21 MiB"),
    ],
    ids=["domain", "host"],
)
def test_no_room_there(host, guest, tiny_home, by_ssh, host_memory, match):
    """The far file system is full: its own words, and the guest goes on."""
    (tiny_home / "filler").write_bytes(bytes(6 * MIB))
    if host_memory:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XSAVE_HOME", str(tiny_home))
            Xsave(tiny_home).ok("host", "add", "localhost", "--memory", host_memory)
    with pytest.raises(StorageError, match=match):
        migrate_live(host, SshHost("far", "far", far_command(tiny_home)))
    runs_on(host)


def test_a_socket_is_reset(host, guest, xsave_home):
    """The listening end is killed in the middle."""
    there = add_host("b", 64 * MIB)
    listen = ["migrate-receive", "--listen", "tcp:127.0.0.1:0", "--json"]
    with Xsave(xsave_home).start("--host", "b", *listen) as process:
        address = json.loads(process.stdout.readline())["listening"]
        fails_at("round", host, open_target(address), process.kill)
    nothing_is_left_soon(there)
