"""How a migration reaches its target: a `migrate-receive` process at the end of two pipes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from xsave.errors import StorageError
from xsave.host.host import Host

_EXIT_WAIT_S = 10.0
_MAX_COMPLAINT = 2000


class Receiver:
    """A running migrate-receive: write the image to `input`, read its messages from `output`."""

    def __init__(self, target: Host, cpu_mismatch: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this
        root = str(Path(__file__).resolve().parents[2])
        path = os.environ.get("PYTHONPATH", "")
        command = [sys.executable, "-m", "xsave", "--host", target.name, "-q", "--progress", "none"]
        try:
            self._process = subprocess.Popen(
                [*command, "migrate-receive", "--cpu-mismatch", cpu_mismatch],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for the sender, which tells the other end
                env=os.environ | {"PYTHONPATH": f"{root}:{path}" if path else root},
            )
        except OSError as e:
            self._errors.close()
            raise StorageError(f"cannot start the receiving end: {e.strerror}") from e
        assert self._process.stdin is not None and self._process.stdout is not None
        self.input = self._process.stdin.fileno()
        self.output = self._process.stdout.fileno()

    def complaint(self) -> str:
        """Return the last thing the receiver said about its failure, "" if nothing."""
        self.close()
        self._errors.seek(0)
        lines = self._errors.read()[-_MAX_COMPLAINT:].decode(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """Close both pipes and wait for the process; one that hangs is ended."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        try:
            self._process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
        self._errors.close()
