"""The kinds of far ends: `migrate-receive` here, through ssh, at a socket, and a real xl's.

An option for the far end (a name and its value) is an option on its command line, or, over a
socket, part of the one line that the sender says first. A real xl gets none.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xsave.errors import ConnectionLost, StorageError, UsageError
from xsave.host import handshake
from xsave.host.address import PREFIXES, Address
from xsave.host.asking import own_command, own_environment
from xsave.host.host import Host, open_host
from xsave.host.ssh import SshHost, can_ask, explain, find_ssh_host, ssh_command, start_error
from xsave.host.striping import Part
from xsave.host.transport import Channel, Receiver, widen

_EXIT_WAIT_S = 10.0
_ASKING_TIMEOUT_S = 300.0
_MAX_SAID_BYTES = 1 << 16
XL_PREFIX = "xl:"
_ONE_CONNECTION = "a real xl takes one connection: leave --connections out"
_NO_ZSTD = "a real xl takes no zstd: leave --compress out"
NO_POSTCOPY = "a real xl takes no post-copy: leave --postcopy out"


@dataclass(frozen=True)
class SocketTarget:
    """An xsave (or anything that talks like xl) that listens."""

    name: str
    address: Address


@dataclass(frozen=True)
class XlTarget:
    """A command line for sh, at the end of which `xl migrate-receive` is."""

    name: str
    command: str


Target = Host | SshHost | SocketTarget | XlTarget


def open_target(text: str) -> Target:
    """Return where `migrate --to` is to go. Raises NotFound, UsageError."""
    if text.startswith(XL_PREFIX):
        command = text.removeprefix(XL_PREFIX)
        if not command.strip():
            raise UsageError(f"{text!r}: expected {XL_PREFIX}COMMAND, such as xl:ssh dom0 xl ...")
        return XlTarget(text, command)
    if text.startswith(PREFIXES):
        return SocketTarget(text, Address.parse(text))
    return find_ssh_host(text) or open_host(text)


def connect(target: Target, options: Mapping[str, str], nr_connections: int = 1) -> Receiver:
    """Reach a migrate-receive with these options ({"cpu-mismatch": "refuse"}; "" for a switch).

    Raises StorageError, UsageError."""
    parts = Part.of(nr_connections) if nr_connections > 1 else []
    match target:
        case Host():
            return LocalReceiver(target, options, parts)
        case SshHost():
            return SshReceiver(target, options, parts)
        case SocketTarget():
            return SocketReceiver(target, options, parts)
        case XlTarget():
            if parts:
                raise UsageError(_ONE_CONNECTION)
            return XlReceiver(target)


class ProcessReceiver(Receiver):
    """A process that takes the image on its stdin and answers on its stdout; others beside it, if
    there are, take parts of the image on theirs."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environment: Mapping[str, str] | None = None,
        *,
        shares_terminal: bool = False,
    ) -> None:
        """shares_terminal: it may ask a person something. Raises OSError.

        Ctrl-C is for the sender alone, which tells the other end; so the process has a session of
        its own, or ignores it (ssh leaves an ignored signal alone)."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended_by_us = False
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if shares_terminal else None
        try:
            for command in commands:
                self._start(command, environment, new_session=not shares_terminal)
        except OSError:
            self._end()
            self._errors.close()
            raise
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
        self._process = self._processes[0]
        assert self._process.stdout is not None
        inputs = [one.stdin.fileno() for one in self._processes if one.stdin is not None]
        super().__init__(inputs, self._process.stdout.fileno())
        for fd in inputs:
            widen(fd)

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str] | None, *, new_session: bool
    ) -> None:
        self._processes.append(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL if self._processes else subprocess.PIPE,
                stderr=self._errors,
                start_new_session=new_session,
                env=environment,
            )
        )

    @property
    def pid(self) -> int:
        """The process's."""
        return self._process.pid

    def said(self) -> str:
        """Return what is on its stderr."""
        self.close()
        self._errors.seek(max(self._errors.seek(0, os.SEEK_END) - _MAX_SAID_BYTES, 0))
        return self._errors.read().decode(errors="replace")

    def silence(self, said: str) -> str:
        if self._ended_by_us:
            return ""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        last = "".join(c for c in lines[-1] if c.isprintable()) if lines else ""
        return self.explain(self._process.returncode, last)

    def explain(self, status: int, last: str) -> str:
        """Say why the process ended with this status; last: the last line on its stderr."""
        return f"the receiving end said: {last}" if last else ""

    def close(self) -> None:
        """Close the pipes and wait for the processes; one that hangs is ended."""
        super().close()
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None and not pipe.closed:
                    pipe.close()
        for process in self._processes:
            self._await(process)

    def _await(self, process: subprocess.Popen[bytes]) -> None:
        for end in (process.terminate, process.kill):
            try:
                process.wait(_EXIT_WAIT_S)
                return
            except subprocess.TimeoutExpired:
                self._ended_by_us = True
                end()
        process.wait()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._errors.close()


class LocalReceiver(ProcessReceiver):
    """`migrate-receive` for another host of this machine."""

    def __init__(self, target: Host, options: Mapping[str, str], parts: Sequence[Part]) -> None:
        commands = [own_command(target, given) for given in _arguments(options, parts)]
        try:
            super().__init__(commands, own_environment())
        except OSError as e:
            raise StorageError(f"cannot start the receiving end: {e.strerror}") from e


class SshReceiver(ProcessReceiver):
    """`migrate-receive` on another machine. That it is an xsave, and no xl, is sure: no xl takes
    the options it is given."""

    def __init__(self, target: SshHost, options: Mapping[str, str], parts: Sequence[Part]) -> None:
        self._target = target
        asking = can_ask()
        if asking:
            self.banner_timeout_s = _ASKING_TIMEOUT_S
        commands = [ssh_command(target, given) for given in _arguments(options, parts)]
        try:
            super().__init__(commands, shares_terminal=asking)
        except OSError as e:
            raise start_error(target, e) from e

    def explain(self, status: int, last: str) -> str:
        return explain(self._target, status, last) if status else ""


class XlReceiver(ProcessReceiver):
    """A real `xl migrate-receive`, spoken to as another xl does."""

    is_xsave = False

    def __init__(self, target: XlTarget) -> None:
        self._name = target.name
        asking = can_ask()
        if asking:
            self.banner_timeout_s = _ASKING_TIMEOUT_S
        try:
            command = ["/bin/sh", "-c", target.command]
            super().__init__([command], shares_terminal=asking)
        except OSError as e:
            raise StorageError(f"{target.name}: cannot start it: {e.strerror}") from e

    def channel(self, compress_level: int | None, bandwidth: float | None) -> Channel:
        if compress_level is not None:
            raise UsageError(_NO_ZSTD)
        return super().channel(compress_level, bandwidth)

    def silence(self, said: str) -> str:
        # libxl goes on complaining after the line that tells; the last ones mislead.
        errors = [line for line in said.splitlines() if "error" in line.lower()]
        return super().silence("\n".join(errors[:1]) or said)

    def explain(self, status: int, last: str) -> str:
        said = last or "it said nothing"
        return f"{self._name} ended with status {status}: {said}" if status or last else ""


class SocketReceiver(Receiver):
    """Whoever listens at a socket: an xsave, which says so, or what talks like xl."""

    def __init__(
        self, target: SocketTarget, options: Mapping[str, str], parts: Sequence[Part]
    ) -> None:
        self._options = options
        self._parts = parts
        self._address = target.address
        self._compresses = False
        self._socks = [target.address.connect()]
        self._sock = self._socks[0]
        self._said: str | None = None
        super().__init__([self._sock.fileno()], self._sock.fileno())
        try:
            self._hear_hello()
        except BaseException:
            self.close()
            raise

    def _hear_hello(self) -> None:
        """Learn who is there, and open the other connections."""
        self._line = handshake.receive_line(self.output, "its banner", self.banner_timeout_s)
        if self._line != handshake.HELLO:
            self.is_xsave = False
            if self._parts:
                raise UsageError(_ONE_CONNECTION)
            if "postcopy" in self._options:
                raise UsageError(NO_POSTCOPY)
            return
        self._answer(self._sock, self._parts[0] if self._parts else None)
        for part in self._parts[1:]:
            self._socks.append(self._address.connect())
            line = handshake.receive_line(
                self._socks[-1].fileno(), "its banner", self.banner_timeout_s
            )
            if line != handshake.HELLO:
                raise StorageError(f"the other end: expected its greeting, found {line[:100]!r}")
            self._answer(self._socks[-1], part)
        self._inputs = [sock.fileno() for sock in self._socks]

    def _answer(self, sock: socket.socket, part: Part | None) -> None:
        options = dict(self._options) | ({"part": str(part)} if part else {})
        try:
            sock.sendall(json.dumps(options).encode() + b"\n")
        except OSError as e:
            raise ConnectionLost(f"cannot send the options: {e.strerror}") from e

    def channel(self, compress_level: int | None, bandwidth: float | None) -> Channel:
        self._compresses = compress_level is not None
        return super().channel(compress_level, bandwidth)

    def bandwidth(self) -> float | None:
        return super().bandwidth() if self.is_xsave else None

    def greet(self) -> None:
        if self.is_xsave:
            super().greet()
            return
        self.expect_banner(self._line)
        if self._compresses:
            raise UsageError(_NO_ZSTD)

    def said(self) -> str:
        """Return what came behind the last message."""
        if self._said is None:
            for sock in self._socks:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
            self._said = _read_rest(self.output).decode(errors="replace")
            self.close()
        return self._said

    def close(self) -> None:
        super().close()
        for sock in self._socks:
            sock.close()


def _arguments(options: Mapping[str, str], parts: Sequence[Part]) -> list[list[str]]:
    """Return the command lines of the receiver, and of those that only bring it their input."""
    given = [w for name, value in options.items() for w in (f"--{name}", *([value] * bool(value)))]
    command = ["-q", "--progress", "none", "migrate-receive", *given, "--json"]
    if not parts:
        return [command]
    return [[*command, "--part", str(part)] for part in parts]


def _read_rest(fd: int) -> bytes:
    """Return what still comes, to the end or until too much or too slow."""
    deadline, rest = time.monotonic() + _EXIT_WAIT_S, b""
    with contextlib.suppress(OSError):
        while len(rest) < _MAX_SAID_BYTES and (left := deadline - time.monotonic()) > 0:
            if not select.select([fd], [], [], left)[0] or not (piece := os.read(fd, 1 << 16)):
                break
            rest += piece
    return rest
