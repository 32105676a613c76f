"""Hosts on other machines, as people and scripts meet them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Xsave
from tests.flows.flow import MIB, create, nothing_is_left, runs_on, state, wait_for, wait_for_tick
from tests.flows.live import migrate_live
from tests.transport.sshd import far_command
from xsave.host import receivers
from xsave.host.host import Host
from xsave.host.receivers import SshReceiver
from xsave.host.ssh import find_ssh_host
from xsave.progress import Round


@pytest.fixture
def xsave(xsave_home, far_options, ssh_path):
    """The command line; the far host is added."""
    xsave = Xsave(xsave_home)
    xsave.ok("host", "add", "far", *far_options)
    return xsave


def names(xsave, *options):
    return [domain["name"] for domain in xsave.json(*options, "list")]


def test_host_add_list_remove(xsave, far_options):
    """A host elsewhere is listed with what is known of it, and forgotten; it is not asked."""
    added = xsave.json("host", "add", "wrong", "--ssh", "nobody-listens", "--remote-host", "x")
    assert added["ssh"] == "nobody-listens"
    assert (added["command"], added["remote_host"]) == ("xsave", "x")
    found = {one["name"]: one for one in xsave.json("host", "list")}
    assert found["wrong"] == added
    assert found["far"]["memory_bytes"] is None
    assert "localhost at far" in xsave.ok("host", "list").out.decode()
    xsave.ok("host", "remove", "wrong")
    assert xsave("--host", "wrong", "list").code == 5
    assert xsave("host", "add", "far", *far_options).code == 5
    assert [one["name"] for one in xsave.json("host", "list")] == ["far"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["new", "--ssh", "far", "--memory", "64M"],
        ["new", "--command", "xsave"],
        ["new", "--ssh", "-oProxyCommand=touch /tmp/x"],
        ["new", "--ssh", ""],
        ["localhost", "--ssh", "far"],
        ["new", "--ssh", "far", "--remote-host", "a b"],
    ],
)
def test_host_add_refuses(xsave, arguments):
    """2, and nothing is added."""
    assert xsave("host", "add", *arguments).code == 2
    assert [one["name"] for one in xsave.json("host", "list")] == ["far"]


def test_migrate_there_and_see_it(xsave, host, far):
    """Live to the other machine, listed with our name for it, watched and ended from here."""
    create(host)
    wait_for_tick(host)
    lines = xsave.ok("migrate", "g", "--to", "far", "--json").out.splitlines()
    answer = json.loads(lines[-1])
    assert (answer["host"], answer["outcome"]) == ("far", "migrated")
    assert answer["nr_rounds"] >= 2
    runs_on(far)
    assert names(xsave) == []
    assert names(xsave, "--host", "far") == ["g"]
    everywhere = xsave.json("list", "--all")
    assert [(d["name"], d["host"]) for d in everywhere] == [("g", "far")]
    assert b"TICK" in xsave.ok("--host", "far", "console", "g", "--log").out
    xsave.ok("--host", "far", "destroy", "g")
    nothing_is_left(far)


SLOW = """
import os, time
while data := os.read(0, 1 << 16):
    time.sleep(len(data) / (2 << 20))
    os.write(1, data)
"""


def test_dry_run(xsave, host, far, far_home, tmp_path):
    """The bandwidth is that of the way there, on which one can be that takes 2 MiB a second."""
    create(host)
    (tmp_path / "slow.py").write_text(SLOW)
    command = f"{sys.executable} {tmp_path}/slow.py | {far_command(far_home)}"
    xsave.ok("host", "add", "slow", "--ssh", "far", "--command", command)
    fast, slow = (
        xsave.json("migrate", "g", "--to", there, "--dry-run")["bandwidth"]
        for there in ("far", "slow")
    )
    assert fast > 4 << 20
    assert 1 << 16 < slow <= 2 << 20
    xsave.ok("host", "remove", "slow")
    nothing_is_left(far)
    runs_on(host)


def test_an_image_through_ssh(xsave, host, far, tmp_path):
    """`save NAME -` and `restore -` of a host elsewhere: the image is a file here, byte for byte
    one; errors and exit codes are those of the far end."""
    xsave.ok("--host", "far", "create", "g", "--memory", "8M")
    wait_for_tick(far)
    image = xsave.ok("--host", "far", "save", "g", "-").out
    (tmp_path / "img").write_bytes(image)
    assert b"TICK" not in image[:4096]
    xsave.ok("image", "verify", tmp_path / "img")
    xsave.ok("--host", "far", "restore", "-", stdin=image)
    runs_on(far)
    result = xsave("--host", "far", "destroy", "nobody", "--json")
    assert result.code == 5
    assert result.json()["exit_code"] == 5
    assert "nobody" in result.err


def test_images_are_here(xsave, host, tmp_path):
    """What has no host is done here, whatever --host says."""
    assert xsave("--host", "far", "image", "info", tmp_path / "none").code == 7
    assert [one["name"] for one in xsave.json("--host", "far", "host", "list")] == [
        "far",
        "localhost",
    ]


def test_migrate_of_a_host_elsewhere_is_refused(xsave, host):
    """Its --to would mean the far machine's hosts."""
    result = xsave("--host", "far", "migrate", "g", "--to", "localhost")
    assert result.code == 2
    assert "run `xsave migrate` there" in result.err


def test_a_host_that_does_not_answer(xsave, host):
    """7; what can be listed is."""
    create(host)
    xsave.ok("host", "add", "down", "--ssh", "nobody-listens")
    result = xsave("--host", "down", "list")
    assert result.code == 7
    assert "host down: ssh nobody-listens" in result.err
    result = xsave("list", "--all", "--json")
    assert result.code == 7
    assert [d["name"] for d in result.json()] == ["g"]
    assert "Connection refused" in result.err
    assert xsave("migrate", "g", "--to", "down").code == 7
    runs_on(host)


@pytest.mark.parametrize("number", [2, 4, 6])
def test_ctrl_c(xsave, host, far, number):
    """Behind one of its events: 130, it runs on here and nothing is there; or it came too late."""
    create(host, memory_bytes=16 * MIB, cmdline="touch=1M write=2M rate=20M")
    wait_for_tick(host)
    with xsave.start("migrate", "g", "--to", "far", "--json") as process:
        for _ in range(number):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read().splitlines()
        code = process.wait(60)
    if code == 130:
        assert json.loads(rest[-1])["outcome"] == "interrupted"
        runs_on(host)
        wait_for(lambda: not far.records())
        nothing_is_left(far)
    else:
        assert code in (0, 9)
        assert code == 9 or state(host) is None


def test_another_host_there(xsave, host, far, far_home, far_options):
    """--remote-host: the far machine has hosts of its own."""
    far_xsave = [*far_options, "--remote-host", "second"]
    xsave.ok("host", "add", "far2", *far_xsave)
    create(host)
    result = xsave("migrate", "g", "--to", "far2")
    assert result.code == 7
    assert "no host named second" in result.err
    xsave.ok("--host", "far", "host", "list")  # done here
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XSAVE_HOME", str(far_home))
        Xsave(far_home).ok("host", "add", "second", "--memory", "64M")
    xsave.ok("migrate", "g", "--to", "far2")
    runs_on(Host(far_home / "hosts" / "second"))


def on_a_terminal(*arguments):
    """Run a command with a terminal of its own; return (pid, the terminal's other end)."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "xsave", *arguments])
    return pid, terminal


def test_ctrl_c_on_a_terminal(xsave, host, far, ssh_path, tmp_path):
    """On a terminal ssh shares it, so that it can ask, and gets its Ctrl-C, too: it must not end
    of that. The guest runs on here, with nothing left there."""
    told = tmp_path / "told"
    script = (ssh_path / "ssh").read_text().replace("exec", f'echo "$@" >> {told}\nexec', 1)
    (ssh_path / "ssh").write_text(script)
    create(host, memory_bytes=16 * MIB, cmdline="touch=1M write=2M rate=20M")
    wait_for_tick(host)
    pid, terminal = on_a_terminal(
        "migrate", "g", "--to", "far", "--bandwidth", "1M", "--downtime", "1"
    )
    wait_for(lambda: any(record.building for record in far.records()))
    ssh = wait_for(lambda: children_of(pid))
    os.write(terminal, b"\x03")
    (status,) = wait_for(lambda: ended(pid, terminal))
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert ssh
    assert "BatchMode" not in told.read_text()
    runs_on(host)
    wait_for(lambda: not far.records())
    nothing_is_left(far)


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def ended(pid, terminal):
    """Read what the command says, so that it can go on; its status once it has ended."""
    if select.select([terminal], [], [], 0.05)[0]:
        with contextlib.suppress(OSError):
            os.read(terminal, 1 << 16)
    found, status = os.waitpid(pid, os.WNOHANG)
    return [status] if found else []


def test_ssh_outlives_ctrl_c(xsave, host, far, monkeypatch):
    """SIGINT to the ssh that shares a terminal does nothing: who is asked to stop is the sender."""
    monkeypatch.setattr(receivers, "can_ask", lambda: True)
    create(host, memory_bytes=16 * MIB, cmdline="touch=1M write=2M rate=20M")
    wait_for_tick(host)
    pids = []
    begin = SshReceiver.__init__

    def begin_and_tell(self, *arguments):
        begin(self, *arguments)
        pids.append(self.pid)

    monkeypatch.setattr(SshReceiver, "__init__", begin_and_tell)

    def report(event):
        if isinstance(event, Round):
            os.kill(pids[0], signal.SIGINT)

    migrate_live(host, find_ssh_host("far"), report=report)
    runs_on(far)
