"""The kinds of far ends: `migrate-receive` here, and through ssh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from xsave.errors import StorageError
from xsave.host.host import Host, open_host
from xsave.host.ssh import SshHost, can_ask, explain, find_ssh_host, ssh_command, start_error
from xsave.host.transport import Receiver, widen

_EXIT_WAIT_S = 10.0
_ASKING_TIMEOUT_S = 300.0
_MAX_SAID_BYTES = 1 << 16


Target = Host | SshHost


def open_target(text: str) -> Target:
    """Return where `migrate --to` is to go. Raises NotFound, UsageError."""
    return find_ssh_host(text) or open_host(text)


def connect(target: Target, options: Mapping[str, str]) -> Receiver:
    """Reach a migrate-receive with these options ({"cpu-mismatch": "refuse"}).

    Raises StorageError."""
    match target:
        case Host():
            return LocalReceiver(target, options)
        case SshHost():
            return SshReceiver(target, options)


class ProcessReceiver(Receiver):
    """A process that takes the image on its stdin and answers on its stdout."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        shares_terminal: bool = False,
    ) -> None:
        """shares_terminal: it may ask a person something. Raises OSError.

        Ctrl-C is for the sender alone, which tells the other end; so the process has a session of
        its own, or ignores it (ssh leaves an ignored signal alone)."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if shares_terminal else None
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=not shares_terminal,
                env=environment,
            )
        except OSError:
            self._errors.close()
            raise
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
        assert self._process.stdin is not None and self._process.stdout is not None
        super().__init__(self._process.stdin.fileno(), self._process.stdout.fileno())
        widen(self._input)

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
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        last = "".join(c for c in lines[-1] if c.isprintable()) if lines else ""
        return self.explain(self._process.returncode, last)

    def explain(self, status: int, last: str) -> str:
        """Say why the process ended with this status; last: the last line on its stderr."""
        return f"the receiving end said: {last}" if last else ""

    def close(self) -> None:
        """Close both pipes and wait for the process; one that hangs is ended."""
        super().close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        try:
            self._process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, tb)
        self._errors.close()


class LocalReceiver(ProcessReceiver):
    """`migrate-receive` for another host of this machine."""

    def __init__(self, target: Host, options: Mapping[str, str]) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.environ.get("PYTHONPATH", "")
        command = [sys.executable, "-m", "xsave", "--host", target.name]
        environment = os.environ | {"PYTHONPATH": f"{root}:{path}" if path else root}
        try:
            super().__init__([*command, *_arguments(options)], environment)
        except OSError as e:
            raise StorageError(f"cannot start the receiving end: {e.strerror}") from e


class SshReceiver(ProcessReceiver):
    """`migrate-receive` on another machine. That it is an xsave, and no xl, is sure: no xl takes
    the options it is given."""

    def __init__(self, target: SshHost, options: Mapping[str, str]) -> None:
        self._target = target
        asking = can_ask()
        if asking:
            self.banner_timeout_s = _ASKING_TIMEOUT_S
        try:
            super().__init__(ssh_command(target, _arguments(options)), shares_terminal=asking)
        except OSError as e:
            raise start_error(target, e) from e

    def explain(self, status: int, last: str) -> str:
        return explain(self._target, status, last) if status else ""


def _arguments(options: Mapping[str, str]) -> list[str]:
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ["-q", "--progress", "none", "migrate-receive", *given, "--json"]
