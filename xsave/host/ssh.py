"""Hosts on other machines: reached through the system's own OpenSSH client, and nothing else.

`ssh` is the one of PATH, with the user's configuration, keys and control sockets: no option is
given that could contradict them, but that it must not ask anything where nobody could answer. At
the far end an ordinary xsave runs, for one of its own hosts.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from xsave.errors import ConnectionLost, NameTaken, StorageError, UsageError
from xsave.host import paths
from xsave.host.registry import NAME_PATTERN, check_name

DEFAULT_COMMAND = "xsave"
DEFAULT_REMOTE_HOST = "localhost"
_MAX_SAID = 2000
#: What ssh itself ends with, and what a shell says of a command it does not find or may not run.
_SSH_FAILED, _NOT_EXECUTABLE, _NOT_FOUND = 255, 126, 127
#: What ssh says of itself, in lower case -> what a person can do about it.
_ADVICE = (
    ("host key verification failed", "run `{try_it}` by hand, and look at the key it shows"),
    ("permission denied", "`{try_it}` must log in; see ssh_config(5) for keys"),
    ("could not resolve", "is the address right? `xsave host remove` and add it again"),
    ("connection refused", "does sshd run there, and on that port?"),
    ("timed out", "is the machine up, and the network?"),
    ("no route", "is the machine up, and the network?"),
)


@dataclass(frozen=True)
class SshHost:
    """A host of another machine: what xsave is called there, and the host's name there."""

    name: str
    ssh: str
    command: str = DEFAULT_COMMAND
    remote_host: str = DEFAULT_REMOTE_HOST


def add_ssh_host(
    name: str, ssh: str, command: str = DEFAULT_COMMAND, remote_host: str = DEFAULT_REMOTE_HOST
) -> SshHost:
    """Remember a host; the machine is not asked. Raises NameTaken, UsageError, StorageError."""
    check_name(name, "host")
    check_name(remote_host, "host")
    if name == DEFAULT_REMOTE_HOST:
        raise UsageError(f"{name} is this machine: call the other one something else")
    if not ssh.strip() or ssh.startswith("-") or any(not c.isprintable() for c in ssh):
        raise UsageError(f"--ssh {ssh!r}: expected USER@ADDRESS, or a Host of ssh_config(5)")
    if not command.strip():
        raise UsageError("--command is empty")
    made = SshHost(name, ssh, command, remote_host)
    root = paths.hosts_directory()
    making = root / f".{name}.{os.getpid()}"
    record = {"name": name, "ssh": ssh, "command": command, "remote_host": remote_host}
    try:
        making.mkdir(mode=0o700)
        (making / "host.json").write_text(json.dumps(record))
        making.rename(root / name)
    except OSError as e:
        shutil.rmtree(making, ignore_errors=True)
        if (root / name).exists():
            raise NameTaken(f"a host named {name} exists already") from e
        raise StorageError(f"cannot write {root / name}: {e.strerror}") from e
    return made


def find_ssh_host(name: str) -> SshHost | None:
    """Return the host of this name if it is on another machine, None if it is not."""
    if not NAME_PATTERN.match(name):
        return None
    try:
        record = json.loads((paths.hosts_directory() / name / "host.json").read_text())
        if record.get("ssh") is None:
            return None
        return SshHost(name, record["ssh"], record["command"], record["remote_host"])
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def list_ssh_hosts() -> list[SshHost]:
    """Return the hosts on other machines, by name."""
    names = sorted(directory.name for directory in paths.hosts_directory().iterdir())
    return [host for name in names if (host := find_ssh_host(name))]


def can_ask() -> bool:
    """Whether a person is there whom ssh could ask for a password."""
    return sys.stdin is not None and sys.stdin.isatty()


def ssh_command(host: SshHost, arguments: Sequence[str], *, terminal: bool = False) -> list[str]:
    """Return the command line that runs xsave with these arguments on the host. terminal: with
    one at the far end, too."""
    options = ["-t" if terminal else "-T"]
    if not can_ask():
        options += ["-o", "BatchMode=yes"]
    there = f"{host.command} {shlex.join(['--host', host.remote_host, *arguments])}"
    return ["ssh", *options, "--", host.ssh, there]


def start_error(host: SshHost, error: OSError) -> StorageError:
    """Say that ssh itself could not be started."""
    if isinstance(error, FileNotFoundError):
        return StorageError(f"host {host.name}: no ssh in PATH (install the OpenSSH client)")
    return StorageError(f"host {host.name}: cannot start ssh: {error.strerror}")


def explain(host: SshHost, status: int, said: str) -> str:
    """Say why ssh, or what it started, ended with this status, and what to do; said: the last
    line on stderr, "" if unknown."""
    where = f"ssh {host.ssh}"
    if status == _NOT_FOUND or (status == 1 and "No module named xsave" in said):
        return (
            f"{where}: {said or 'command not found'} (is xsave installed there? `xsave host add` "
            f"takes its path there as --command; it is {host.command!r} now)"
        )
    if status == _NOT_EXECUTABLE:
        return f"{where}: {said or 'not executable'} (--command is {host.command!r})"
    if status == _SSH_FAILED:
        found = [what for pattern, what in _ADVICE if pattern in said.lower()]
        advice = f" ({found[0].format(try_it=where)})" if found else ""
        return f"{where}: {said or 'the connection, or the command there, was cut off'}{advice}"
    if status < 0:
        return f"{where}: ended by signal {-status}"
    return f"{where}: {said}" if said else f"{where}: the command there ended with {status}"


def last_line(said: bytes) -> str:
    """Return the last line that says anything, printable and of bounded length."""
    text = said[-_MAX_SAID:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "".join(c for c in lines[-1] if c.isprintable()) if lines else ""


def run_there(host: SshHost, arguments: Sequence[str], *, terminal: bool) -> int:
    """Run a command there with our own stdin, stdout and stderr; return its exit status.

    Raises ConnectionLost if ssh failed, or found no xsave."""
    try:
        with subprocess.Popen(ssh_command(host, arguments, terminal=terminal)) as process:
            status = process.wait()
    except OSError as e:
        raise start_error(host, e) from e
    if status in (_SSH_FAILED, _NOT_FOUND, _NOT_EXECUTABLE) or status < 0:
        raise ConnectionLost(f"host {host.name}: {explain(host, status, '')}")
    return status
