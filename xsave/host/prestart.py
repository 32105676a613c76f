"""A domain process that waits for its domain: started first, told later what it is.

Its interpreter, numpy and the emulator take 0.2 s to load, as long as the command itself takes
to load and to read the first records of an image. So the command starts it as its very first
act, before its own imports (this module has none that matter), and the two load side by side.
A process whose command ends without a word ends too.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from xsave.errors import ConnectionLost

PROCESS_MODULE = "xsave.host.process"
_MAX_IDENTITY = 1 << 16


class WaitingProcess:
    """One process of a host that has no domain yet. Raises OSError if it cannot be started."""

    def __init__(self, host_directory: Path, kernel: str | None = None) -> None:
        """kernel: the file it will be built from, if that is known already."""
        unpack = [str(Path(kernel).absolute())] if kernel else []
        self._sock, theirs = socket.socketpair()
        with theirs:
            self.child = subprocess.Popen(
                [
                    sys.executable, "-m", PROCESS_MODULE, str(host_directory), str(theirs.fileno()),
                    *unpack,
                ],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/",
                start_new_session=True, pass_fds=(theirs.fileno(),), env=_environment(),
            )  # fmt: skip

    def become(self, identity: dict[str, Any], descriptors: list[int]) -> None:
        """Tell it its domain; the descriptors are the callee's from then on, too.

        Raises OSError if it is dead."""
        with self._sock:
            socket.send_fds(self._sock, [json.dumps(identity).encode()], descriptors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()


def receive_identity(fd: int, least: int, most: int) -> tuple[dict[str, Any], list[int]]:
    """Wait, in the process, for what it is to become, and its descriptors. Raises ConnectionLost:
    for nothing."""
    with socket.socket(fileno=fd) as sock:
        message, descriptors, _, _ = socket.recv_fds(sock, _MAX_IDENTITY, most)
    if not message or len(descriptors) < least:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        raise ConnectionLost("the command that started this process has ended")
    return json.loads(message), descriptors


def _environment() -> dict[str, str]:
    """Let the child find this very package, installed or not; one thread per numpy is enough."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {
        "PYTHONPATH": f"{root}:{path}" if path else root,
        "OPENBLAS_NUM_THREADS": "1",
    }
