"""Ask a host something: run a command of ours for it, wherever it is, and take its JSON answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xsave.errors import (
    ConnectionLost,
    GuestStateError,
    HandoverUndecided,
    HostCannotTake,
    ImageError,
    NotFound,
    StorageError,
    UsageError,
    XsaveError,
)
from xsave.host.host import Host
from xsave.host.ssh import SshHost, can_ask, explain, last_line, ssh_command, start_error

#: How long an answer may take, in seconds; a person may have to type a password first.
ANSWER_TIMEOUT_S, ANSWER_TIMEOUT_ASKING_S = 60.0, 300.0
_ERRORS: dict[int, type[XsaveError]] = {
    UsageError.exit_code: UsageError,
    ImageError.exit_code: ImageError,
    HostCannotTake.exit_code: HostCannotTake,
    NotFound.exit_code: NotFound,
    GuestStateError.exit_code: GuestStateError,
    HandoverUndecided.exit_code: HandoverUndecided,
}


def own_command(host: Host, arguments: Sequence[str]) -> list[str]:
    """Return the command line that runs this very xsave for another host of this machine."""
    return [sys.executable, "-m", "xsave", "--host", host.name, *arguments]


def own_environment() -> dict[str, str]:
    """Return an environment in which that is found, installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": f"{root}:{path}" if path else root}


def ask(host: Host | SshHost, arguments: Sequence[str]) -> Any:
    """Run a command for the host that answers in one JSON document; return that.

    Raises what the command failed with, as the same kind of error; ConnectionLost if there is no
    answer, from which nothing follows."""
    timeout_s = ANSWER_TIMEOUT_S
    given = ["-q", *arguments, "--json"]
    if isinstance(host, Host):
        command, environment = own_command(host, given), own_environment()
    else:
        command, environment = ssh_command(host, given), dict(os.environ)
        if can_ask():
            timeout_s = ANSWER_TIMEOUT_ASKING_S
    # A file, not a pipe: a control master that ssh leaves behind may hold it open.
    with tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                timeout=timeout_s, check=False, env=environment,
            )  # fmt: skip
        except OSError as e:
            if isinstance(host, SshHost):
                raise start_error(host, e) from e
            raise StorageError(f"cannot start xsave: {e.strerror}") from e
        except subprocess.TimeoutExpired:
            message = f"host {host.name}: no answer within {timeout_s:g} s"
            raise ConnectionLost(message) from None
        errors.seek(0)
        said = last_line(errors.read())
    if isinstance(host, SshHost):
        said = explain(host, done.returncode, said)
    return _answer(host.name, done.returncode, done.stdout, said)


def _answer(name: str, status: int, output: bytes, explanation: str) -> Any:
    """Return the JSON document a command on host `name` answered with; raise its error."""
    try:
        answer = json.loads(output)
    except ValueError:
        if not status:
            explanation = f"expected an answer in JSON, found {output[:80]!r}"
        raise ConnectionLost(f"host {name}: {explanation}") from None
    if not status:
        return answer
    message = answer.get("error") if isinstance(answer, dict) else None
    raise _ERRORS.get(status, StorageError)(f"host {name}: {message or explanation}")
