"""Raw sockets: a migration through tcp or unix, the far end's complaint in the same place."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import sys
import threading

import pytest

from tests.conftest import ROOT, Xsave
from tests.flows.flow import MIB, create, nothing_is_left, runs_on, state, wait_for, wait_for_tick
from tests.flows.live import Oracle, migrate_live, moved, start
from xsave import precopy
from xsave.errors import StorageError, UsageError
from xsave.host import handshake
from xsave.host.address import Address
from xsave.host.host import add_host
from xsave.host.receivers import open_target
from xsave.progress import Round


@pytest.fixture
def there(xsave_home):
    """The host that listens."""
    return add_host("b", 64 * MIB, seed=4)


@pytest.fixture
def listening(xsave_home, tmp_path):
    """Start `migrate-receive --listen`: `listening("tcp") -> (process, address)`."""
    with contextlib.ExitStack() as stack:
        deep = tmp_path / ("deep" * 40)
        deep.mkdir()

        def listen(kind, *options, host="b"):
            where = {"tcp": "tcp:127.0.0.1:0", "tcp6": "tcp:[::1]:0"}.get(
                kind, f"unix:{deep}/socket"
            )
            process = stack.enter_context(
                Xsave(xsave_home).start(
                    "--host", host, "migrate-receive", "--listen", where, "--json", *options
                )
            )
            stack.callback(process.kill)
            return process, json.loads(process.stdout.readline())["listening"]

        yield listen


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "unix"])
def test_live(host, there, listening, monkeypatch, kind):
    """Page for page what it was; empty pages took no bytes; the far end's clock came back; it
    ends, with the domain as its answer and no socket left."""
    if kind == "tcp6" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    oracle, events = Oracle(monkeypatch, there), []
    create(host, memory_bytes=16 * MIB, cmdline="touch=1M write=4M rate=40M rest=2")
    wait_for_tick(host)
    process, address = listening(kind)
    if kind == "unix":
        path = address.removeprefix("unix:")
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600  # noqa: PTH116
    result = migrate_live(host, open_target(address), report=events.append)
    assert oracle.found.different == ()
    first = next(event for event in events if isinstance(event, Round))
    assert first.nr_bytes < (first.nr_pages - 1500) * 4096
    assert result.guest_downtime_ns != result.downtime_ns
    answer = json.loads(process.stdout.readline())
    assert (answer["name"], process.wait(20)) == ("g", 0)
    if kind == "unix":
        assert not os.path.exists(path)  # noqa: PTH110
    assert state(host) is None
    runs_on(there)


def test_zstd(host, there, listening, monkeypatch):
    """--compress."""
    oracle = Oracle(monkeypatch, there)
    create(host)
    wait_for_tick(host)
    migrate_live(host, open_target(listening("tcp")[1]), compress_level=1)
    assert oracle.found.different == ()
    runs_on(there)


def test_dry_run(host, there, listening, xsave_home):
    """Bytes go there and are counted, the far end waits for the next one: that is a migration."""
    create(host)
    wait_for_tick(host)
    process, address = listening("tcp")
    xsave = Xsave(xsave_home)
    for _ in range(2):
        answer = xsave.json("migrate", "g", "--to", address, "--dry-run")
        assert answer["bandwidth"] > 1 << 20
    assert there.records() == []
    migrate_live(host, open_target(address))
    assert process.wait(20) == 0
    moved(host, there)


def test_dry_run_to_nobody(host, there, xsave_home, tmp_path):
    """The target is asked: one that is not there is an error. What talks like a real xl is not
    sent a byte."""
    create(host)
    xsave = Xsave(xsave_home)
    failed = xsave("migrate", "g", "--to", f"unix:{tmp_path}/none", "--dry-run")
    assert (failed.code, "cannot connect" in failed.err) == (7, True)
    with like_xl(tmp_path, xsave_home) as address:
        assert xsave.json("migrate", "g", "--to", address, "--dry-run")["bandwidth"] > 1 << 20
    nothing_is_left(there)
    runs_on(host)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_postcopy(host, there, listening, kind):
    """What a heavy writer wrote since the one round follows it, some of it because it asked; the
    far end ends when all is there, and says so."""
    start(host)
    process, address = listening(kind)
    result = migrate_live(host, open_target(address), postcopy=True, bandwidth=3 * MIB)
    assert result.postcopy_pages > 500
    assert result.postcopy_faults > 0
    assert json.loads(process.stdout.readline())["name"] == "g"
    assert process.wait(20) == 0
    moved(host, there)


def test_postcopy_whose_sender_dies(host, there, listening):
    """The guest is lost, and the far end says so: 7, and its guest does nothing any more."""
    start(host)
    process, address = listening("tcp")
    command = Xsave(there.directory.parents[1]).start(
        "migrate", "g", "--to", address, "--postcopy", "--yes", "--bandwidth", "1M"
    )
    wait_for(lambda: state(there) == "running")
    command.kill()
    assert process.wait(60) == 7
    assert "memory was lost" in process.stderr.read().decode()
    assert state(there) == "crashed"
    assert state(host) == "suspended"


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_the_complaint_comes_back(host, there, listening, kind):
    """The receiver's own reason, also where it gives up while we write; the guest goes on."""
    create(there, "other", memory_bytes=56 * MIB)
    create(host, memory_bytes=16 * MIB, cmdline="touch=8M")
    wait_for_tick(host)
    process, address = listening(kind)
    with pytest.raises(StorageError, match=r"the receiving end said: host b has \d+ free frames"):
        migrate_live(host, open_target(address))
    assert process.wait(20) == 8
    runs_on(host)
    with there.find("other") as domctl:
        domctl.destroy()
    nothing_is_left(there)


def test_the_sender_is_gone(host, there, listening):
    """A connection that ends before its image is whole: nothing is left, the command fails."""
    process, address = listening("tcp")
    with Address.parse(address).connect() as sock:
        assert handshake.receive_line(sock.fileno(), "hello", 20) == handshake.HELLO
        sock.sendall(b"{}\n")
        assert handshake.receive_line(sock.fileno(), "banner", 20) == handshake.BANNER
        sock.sendall(b"\0" * 10)
    assert process.wait(20) in (3, 7)
    nothing_is_left(there)


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n", b'{"cpu-mismatch": 1}\n', b"[]\n"])
def test_a_stranger(there, listening, line):
    """7, and one clear error."""
    process, address = listening("tcp")
    with Address.parse(address).connect() as sock:
        sock.sendall(line)
        assert process.wait(20) == 7
    said = process.stderr.read()
    assert b"expected a line of options" in said
    assert said.count(b"\n") == 1
    nothing_is_left(there)


def test_an_option_that_nobody_knows_is_left_out(host, there, listening):
    """A sender of a later version may say more."""
    process, address = listening("tcp")
    with Address.parse(address).connect() as sock:
        handshake.receive_line(sock.fileno(), "hello", 20)
        sock.sendall(b'{"from-the-future": "yes"}\n')
        assert handshake.receive_line(sock.fileno(), "banner", 20) == handshake.BANNER
    assert process.wait(20) == 3


def test_nobody_listens(host, there, tmp_path):
    """One clear error, and the guest goes on."""
    create(host)
    for address in ("tcp:127.0.0.1:1", f"unix:{tmp_path}/none", "tcp:no.such.invalid:1"):
        with pytest.raises(StorageError, match=f"cannot connect to {address}: "):
            migrate_live(host, open_target(address))
    runs_on(host)


@pytest.mark.parametrize(
    "text",
    ["tcp:", "tcp:host", "tcp:host:", "tcp:host:65536", "tcp::1", "tcp:::1:1", "unix:", "xl: "],
)
def test_addresses_that_are_none(text):
    with pytest.raises(UsageError):
        open_target(text)


def test_listen_refuses(there, xsave_home, tmp_path):
    """A bad address is 2, one that cannot be had 7; a file is not replaced."""
    xsave = Xsave(xsave_home)
    assert xsave("--host", "b", "migrate-receive", "--listen", "7000").code == 2
    (tmp_path / "file").write_text("mine")
    result = xsave("--host", "b", "migrate-receive", "--listen", f"unix:{tmp_path}/file")
    assert result.code == 7
    assert "Address already in use" in result.err
    assert (tmp_path / "file").read_text() == "mine"
    result = xsave("--host", "b", "migrate-receive", "--listen", "tcp:192.0.2.1:7000")
    assert result.code == 7


@contextlib.contextmanager
def like_xl(directory, home):
    """Give the address of a socket behind which is what talks like a real xl, and the options it
    was started with: what stands there is `xsave migrate-receive`, which says nothing more than
    an xl does."""
    receiver = f"exec env XSAVE_HOME={home} PYTHONPATH={ROOT} {sys.executable} -m xsave --host b"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            import subprocess

            sock, _ = server.accept()
            with sock:
                command = ["/bin/sh", "-c", f"{receiver} -q migrate-receive"]
                subprocess.run(command, stdin=sock, stdout=sock, check=False)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"tcp:127.0.0.1:{server.getsockname()[1]}"
        thread.join(20)


def test_a_real_xl_behind_a_socket(host, there, xsave_home, monkeypatch, tmp_path):
    """By its banner: every empty page comes with its bytes."""
    oracle, events = Oracle(monkeypatch, there), []
    create(host, memory_bytes=16 * MIB)
    wait_for_tick(host)
    with like_xl(tmp_path, xsave_home) as address:
        migrate_live(host, open_target(address), report=events.append)
    assert oracle.found.different == ()
    first = next(event for event in events if isinstance(event, Round))
    assert first.nr_bytes > first.nr_pages * 4096
    runs_on(there)


def test_zstd_is_nothing_for_a_real_xl(host, there, xsave_home, tmp_path):
    """Refused before a byte of the image is sent."""
    create(host)
    with (
        like_xl(tmp_path, xsave_home) as address,
        pytest.raises(UsageError, match="no zstd"),
    ):
        migrate_live(host, open_target(address), compress_level=1)
    runs_on(host)


def test_postcopy_is_nothing_for_a_real_xl(host, there, xsave_home, tmp_path):
    """Refused before a byte of the image is sent."""
    create(host)
    with (
        like_xl(tmp_path, xsave_home) as address,
        pytest.raises(UsageError, match="no post-copy"),
    ):
        migrate_live(host, open_target(address), postcopy=True)
    runs_on(host)
    nothing_is_left(there)


# ---- xl:COMMAND


def xl_command(home, *options):
    """Return a command line that talks like `xl migrate-receive`."""
    environment = f"XSAVE_HOME={home} PYTHONPATH={ROOT}"
    return f"xl:{environment} {sys.executable} -m xsave --host b -q migrate-receive"


def test_xl(host, there, xsave_home, monkeypatch):
    """xl:COMMAND runs the command through sh and sends every page with its bytes."""
    monkeypatch.setattr(precopy, "_HOPELESS_ROUNDS", 99)  # all the rounds there may be
    oracle, events = Oracle(monkeypatch, there), []
    create(host, memory_bytes=16 * MIB, cmdline="touch=1M write=4M rate=40M rest=2")
    wait_for_tick(host)
    result = migrate_live(host, open_target(xl_command(xsave_home)), report=events.append)
    assert oracle.found.different == ()
    first = next(event for event in events if isinstance(event, Round))
    assert first.zero_pages > 1500
    assert first.nr_bytes > (first.nr_pages - first.deferred_pages) * 4096
    assert result.nr_rounds == 6
    runs_on(there)


def test_xl_says_what_it_said(host, there, tmp_path):
    """An error of libxl, the first of many lines; a command that is not there; zstd."""
    create(host)
    script = tmp_path / "xl"
    script.write_text(
        "#!/bin/sh\necho 'migration target: Ready' >&2\necho 'libxl: error: no room' >&2\n"
        "echo 'libxl: error: rebuild: -3' >&2; exit 1\n"
    )
    script.chmod(0o755)
    with pytest.raises(StorageError, match="ended with status 1: libxl: error: no room"):
        migrate_live(host, open_target(f"xl:{script}"))
    with pytest.raises(StorageError, match=r"ended with status 127: .*not found"):
        migrate_live(host, open_target("xl:/nowhere/xl"))
    with pytest.raises(UsageError, match="no zstd"):
        migrate_live(host, open_target("xl:cat"), compress_level=1)
    runs_on(host)
    wait_for(lambda: not there.records())
