"""A real sshd on loopback, for whoever runs the tests: its own keys, its own port, nothing of the
user's configuration.

The client is the system's, too: a directory for PATH has an `ssh` that gives it a private
configuration, in which `far` is the host and others are wrong in one way each.
"""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
SSH, KEYGEN = shutil.which("ssh"), shutil.which("ssh-keygen")

_SERVER = """
Port {port}
ListenAddress {address}
HostKey {directory}/host_key
PidFile none
AuthorizedKeysFile {directory}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PrintMotd no
"""
_CLIENT = """
Host far shared stranger
    HostName {address}
    Port {port}
Host unknown-key
    HostName {address}
    Port {port}
    UserKnownHostsFile /dev/null
Host nobody-listens
    HostName {address}
    Port {closed}
Host shared
    ControlMaster auto
    ControlPersist 20
    ControlPath {directory}/control
Host stranger
    IdentityFile {directory}/other_key
Host * !stranger
    IdentityFile {directory}/user_key
Host *
    User {user}
    IdentitiesOnly yes
    UserKnownHostsFile {directory}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
"""


def require():
    """Skip, with the reason, where there is no OpenSSH; in CI that is a failure."""
    missing = [name for name, path in (("sshd", SSHD), ("ssh", SSH)) if not path]
    if missing:
        answer = pytest.fail if os.environ.get("XSAVE_CI") else pytest.skip
        answer(f"no {' and no '.join(missing)} (openssh-server, openssh-client)")


def free_port(address="127.0.0.1"):
    with socket.create_server((address, 0)) as sock:
        return sock.getsockname()[1]


class Sshd:
    """The server, and `bin`, the directory with the client. The commands in front of the two are
    there for network namespaces; address is where it listens then."""

    def __init__(self, directory: Path, address="127.0.0.1", before_server=(), before_client=()):
        require()
        self.directory, self.bin = directory, directory / "bin"
        self.bin.mkdir(parents=True)
        for name in ("host_key", "user_key", "other_key"):
            path = directory / name
            subprocess.run([KEYGEN, "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
        if not os.getuid():
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        port, closed = free_port(), free_port()
        facts = {
            "port": port, "closed": closed, "address": address, "directory": directory,
            "user": getpass.getuser(),
        }  # fmt: skip
        (directory / "server").write_text(_SERVER.format(**facts))
        (directory / "client").write_text(_CLIENT.format(**facts))
        key = (directory / "host_key.pub").read_text()
        (directory / "known_hosts").write_text(f"[{address}]:{port} {key}")
        self.client(f'exec {shlex.join(before_client)} {SSH} -F {directory}/client "$@"')
        with (directory / "log").open("wb") as log:
            command = [*before_server, SSHD, "-D", "-e", "-f", directory / "server"]
            self._process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
        self._wait()

    def client(self, script):
        """Have `ssh` be this script of sh."""
        path = self.bin / "ssh"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def _wait(self):
        deadline = time.monotonic() + 20
        hello = [self.bin / "ssh", "-o", "BatchMode=yes", "far", "true"]
        while (done := subprocess.run(hello, capture_output=True)).returncode:
            log = (self.directory / "log").read_text()
            assert self._process.poll() is None, log
            assert time.monotonic() < deadline, done.stderr + log.encode()
            time.sleep(0.1)

    def stop(self):
        subprocess.run([self.bin / "ssh", "-O", "exit", "shared"], capture_output=True, check=False)
        self._process.terminate()
        self._process.wait()


def far_command(home: Path) -> str:
    """Return what xsave is called at the far end: this one, with a home of its own."""
    return shlex.join(
        ["env", f"XSAVE_HOME={home}", f"PYTHONPATH={ROOT}", sys.executable, "-m", "xsave"]
    )
