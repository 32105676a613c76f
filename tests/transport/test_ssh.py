"""Migration to another machine, through a real sshd: live, and whole at every ending."""

from __future__ import annotations

import os
import signal

import pytest

from tests.flows.flow import (
    MIB,
    console,
    create,
    nothing_is_left,
    runs_on,
    state,
    wait_for,
    wait_for_tick,
)
from tests.flows.live import Oracle, migrate_live
from xsave import precopy
from xsave.errors import ConnectionLost, HandoverUndecided, NotFound, StorageError, UsageError
from xsave.host.asking import ask
from xsave.host.receivers import SshReceiver
from xsave.host.ssh import SshHost
from xsave.host.transport import Channel
from xsave.progress import Round, Stage

#: Writes all of its 4 MiB ten times a second, makes and destroys page tables without rest.
HEAVY = "touch=1M write=4M rate=40M rest=2"


def start(host, cmdline=HEAVY):
    create(host, memory_bytes=16 * MIB, cmdline=cmdline, vcpus=2)
    wait_for_tick(host)


def moved(host, far):
    """Assert that the guest is here no more, and runs on there."""
    assert state(host) is None
    nothing_is_left(host)
    runs_on(far)


def used_before(far):
    """Have guests that filled it come and go: what is left in its frames would be seen."""
    create(far, "old", memory_bytes=56 * MIB, cmdline="touch=48M")
    wait_for_tick(far, "old")
    with far.find("old") as domctl:
        domctl.destroy()
    nothing_is_left(far)


def test_live(host, far, by_ssh, monkeypatch):
    """Five rounds of a heavy writer over ssh: page for page what it was at its suspend. Its empty
    pages took no bytes, and are zeros there, whoever had those frames before."""
    monkeypatch.setattr(precopy, "_HOPELESS_ROUNDS", 99)  # all the rounds there may be
    used_before(far)
    oracle, events = Oracle(monkeypatch, far), []
    start(host)
    result = migrate_live(host, by_ssh, report=events.append)
    assert oracle.found.different == ()
    assert oracle.found.equal_pages > 3000
    rounds = [event for event in events if isinstance(event, Round)]
    assert len(rounds) == 5
    assert rounds[0].zero_pages > 1500
    assert rounds[0].nr_bytes < (rounds[0].nr_pages - 1500) * 4096
    assert result.guest_downtime_ns > 0
    assert result.guest_downtime_ns != result.downtime_ns  # the far end has said its clock
    moved(host, far)


def test_frames_that_are_not_empty_would_be_seen(host, far, by_ssh, monkeypatch):
    """The test above can fail: dirt in the far frames shows where no bytes came."""
    oracle = Oracle(monkeypatch, far)

    def fail(*_):
        raise StorageError("seen enough")

    monkeypatch.setattr(Channel, "send", fail)  # the go-ahead
    far.machine.mem[far.machine.first_frame :, 300] = 7
    start(host)
    with pytest.raises(StorageError):
        migrate_live(host, by_ssh)
    assert len(oracle.found.different) > 1000


@pytest.mark.parametrize("options", [{"compress_level": 1}, {"live": False}], ids=["zstd", "still"])
def test_other_ways(host, far, by_ssh, monkeypatch, options):
    """Compressed, and suspended first."""
    oracle = Oracle(monkeypatch, far)
    start(host)
    migrate_live(host, by_ssh, **options)
    assert oracle.found.different == ()
    moved(host, far)


def test_a_control_master(host, far, far_home, by_ssh):
    """A user's own ssh configuration holds: connections are shared, and the one that stays open
    keeps nobody waiting."""
    shared = SshHost("far", "shared", by_ssh.command)
    start(host)
    migrate_live(host, shared)
    assert [domain["name"] for domain in ask(shared, ["list"])] == ["g"]
    moved(host, far)


def fails(host, target, match):
    """Assert that a migration fails with one clear error, and the guest goes on."""
    if state(host) is None:
        create(host)
    with pytest.raises(StorageError, match=match) as caught:
        migrate_live(host, target)
    assert "\n" not in str(caught.value)
    assert "the guest goes on here" in str(caught.value)
    runs_on(host)


def test_what_ssh_refuses(host, far, by_ssh):
    """A key nobody knows, a stranger, nobody there: what ssh says, and what to do."""
    known = by_ssh.command
    fails(
        host,
        SshHost("far", "unknown-key", known),
        "Host key verification failed.*run `ssh unknown-key`",
    )
    fails(host, SshHost("far", "stranger", known), "Permission denied.*must log in")
    fails(host, SshHost("far", "nobody-listens", known), "Connection refused.*does sshd run")
    fails(host, SshHost("far", "no.such.invalid", known), "ssh no.such.invalid: .*resolve")
    nothing_is_left(far)


def test_no_xsave_there(host, by_ssh, tmp_path):
    """A command that is not found, is no program, is a Python without xsave, or not one at all."""
    fails(host, SshHost("far", "far", "/nowhere/xsave"), "not found|No such file.*--command")
    (tmp_path / "file").write_text("")
    fails(host, SshHost("far", "far", str(tmp_path / "file")), "ermission denied.*--command")
    fails(host, SshHost("far", "far", "python3 -P -m xsave"), "No module named xsave.*--command")
    fails(host, SshHost("far", "far", "true"), "closed the connection before its banner")


def test_a_shell_that_talks(host, by_ssh):
    """What a start-up file of the far shell writes is named, and not taken for the banner."""
    noisy = SshHost("far", "far", f"echo Welcome to far; {by_ssh.command}")
    fails(host, noisy, "expected its banner, found b'Welcome to far.*start-up file")


def test_no_ssh_here(host, far, by_ssh, monkeypatch, tmp_path):
    """Nothing to start."""
    create(host)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(StorageError, match="no ssh in PATH"):
        migrate_live(host, by_ssh)
    runs_on(host)


def test_the_host_there_has_its_own_name(host, far, by_ssh):
    """--remote-host: one that is not there is the far end's error."""
    fails(host, SshHost("far", "far", by_ssh.command, "other"), "no host named other")


def test_a_real_xl_is_not_taken_for_ours(host, by_ssh, ssh_path):
    """A real xl knows none of the options and ends; never would it get pages without bytes."""
    xl = ssh_path / "xl"
    xl.write_text('#!/bin/sh\ncase $1 in -*) echo "unknown global option" >&2; exit 2;; esac\n')
    xl.chmod(0o755)
    fails(host, SshHost("far", "far", str(xl)), "unknown global option")


def test_ask(host, far, by_ssh):
    """A command there answers here in JSON, and fails here as there; so does one for our host."""
    create(host)
    assert [domain["name"] for domain in ask(host, ["list"])] == ["g"]
    with pytest.raises(NotFound, match="host localhost: no domain named nobody"):
        ask(host, ["destroy", "nobody"])
    assert ask(by_ssh, ["list"]) == []
    assert ask(by_ssh, ["info"])["nr_frames"] == far.nr_frames
    with pytest.raises(NotFound, match="host far: no domain named nobody"):
        ask(by_ssh, ["destroy", "nobody"])
    with pytest.raises(UsageError):
        ask(by_ssh, ["destroy"])
    with pytest.raises(ConnectionLost, match="Connection refused"):
        ask(SshHost("far", "nobody-listens", by_ssh.command), ["list"])
    with pytest.raises(ConnectionLost, match="expected an answer in JSON, found b'hello"):
        ask(SshHost("far", "far", "echo hello; exit;"), ["list"])


def test_arguments_arrive_as_they_are(by_ssh):
    """Spaces, quotes, dollars and newlines go through two shells unharmed."""
    name = 'it\'s $HOME "x" * ; \n#'
    with pytest.raises(NotFound) as caught:
        ask(by_ssh, ["destroy", name])
    assert name in str(caught.value)


def test_batch_mode_without_a_terminal(by_ssh, monkeypatch):
    """Where nobody can answer, ssh may not ask; where somebody can, nothing is said about it."""
    from xsave.host import ssh

    monkeypatch.setattr(ssh, "can_ask", lambda: False)
    assert "BatchMode=yes" in ssh.ssh_command(by_ssh, ["list"])
    monkeypatch.setattr(ssh, "can_ask", lambda: True)
    command = ssh.ssh_command(by_ssh, ["list"])
    assert command[:4] == ["ssh", "-T", "--", "far"]
    assert SshReceiver.is_xsave


def test_postcopy(host, far, by_ssh):
    """The rest of the memory follows the guest through the same ssh; its receiver stays until all
    has come, or the connection would be closed."""
    start(host)
    result = migrate_live(host, by_ssh, postcopy=True, bandwidth=8 * MIB)
    assert result.postcopy_pages > 200
    assert result.guest_downtime_ns != result.downtime_ns
    moved(host, far)
    assert "CHECK FAILED" not in console(far)


def test_postcopy_is_cut(host, far, by_ssh, monkeypatch):
    """ssh dies while the memory follows: the guest is lost, and both ends say so."""
    pids = []
    begun = SshReceiver.__init__

    def noted(receiver, *arguments):
        begun(receiver, *arguments)
        pids.append(receiver.pid)

    def cut(event):
        if isinstance(event, Stage) and event.name == "post-copy":
            os.kill(pids[0], signal.SIGKILL)

    monkeypatch.setattr(SshReceiver, "__init__", noted)
    start(host)
    with pytest.raises(HandoverUndecided):
        migrate_live(host, by_ssh, postcopy=True, bandwidth=8 * MIB, report=cut)
    assert state(host) == "suspended"
    wait_for(lambda: state(far) == "crashed")
