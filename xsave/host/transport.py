"""How a migration reaches its target: a `migrate-receive` process at the end of two pipes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from xsave.errors import ConnectionLost, StorageError
from xsave.host.host import Host
from xsave.host.pacing import PacedSink
from xsave.host.sink import DescriptorSink, Sink
from xsave.image.buffers import Buffer, Zeros

_EXIT_WAIT_S = 10.0
_MAX_COMPLAINT = 2000
_COMPLAINT = "xsave: error: "
#: What an ordinary user may ask for (fs.pipe-max-size).
_PIPE_BYTES = 1 << 20
_SAMPLE_BYTES = 64 << 20


class Channel:
    """What is written to the receiver: an image, compressed if asked to, and messages behind it.

    No faster than bandwidth, in bytes a second on the wire.
    """

    def __init__(self, fd: int, compress_level: int | None, bandwidth: float | None) -> None:
        self._wire = DescriptorSink(os.dup(fd), "the receiving end")
        self._sink: Sink = self._wire if bandwidth is None else PacedSink(self._wire, bandwidth)
        self._compressing = None
        if compress_level is not None:
            from xsave.host.compression import CompressingSink

            self._sink = self._compressing = CompressingSink(self._sink, compress_level)

    def write(self, buffers: Iterable[Buffer]) -> None:
        self._sink.write(buffers)

    def flush(self) -> None:
        """Have everything on its way that was written."""
        if self._compressing is not None:
            self._compressing.flush()

    def send(self, message: bytes, what: str) -> None:
        """Write a message behind the image. Raises ConnectionLost."""
        try:
            self.write([message])
            self.flush()
        except StorageError as e:
            raise ConnectionLost(f"cannot send {what} to the other end: {e}") from e

    def wire_bytes(self) -> int:
        """Return how many bytes have left."""
        return self._wire.position

    def close(self) -> None:
        """Let it go; what was flushed arrives."""
        self._sink.abort()


def measured_bandwidth() -> float:
    """Return how many bytes a second go through a pipe here, as a migration's would."""
    reading, writing = os.pipe()
    _widen(writing)

    def read() -> None:
        with open(reading, "rb", buffering=0) as pipe:  # noqa: PTH123
            while pipe.read(1 << 20):
                pass

    thread = threading.Thread(target=read)
    thread.start()
    began = time.monotonic()
    with DescriptorSink(writing, "a pipe") as sink:
        sink.write([Zeros(_SAMPLE_BYTES)])
    thread.join()
    return _SAMPLE_BYTES / (time.monotonic() - began)


def _widen(fd: int) -> None:
    """Let a pipe hold more; whoever may not have that has a little less speed."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


class Receiver:
    """A running migrate-receive: write the image to its `channel`, read its messages from `output`.

    zeroes: it gives out empty frames, so that an empty page needs no bytes.
    """

    zeroes = True

    def __init__(self, target: Host, cpu_mismatch: str, transaction: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this
        root = str(Path(__file__).resolve().parents[2])
        path = os.environ.get("PYTHONPATH", "")
        command = [sys.executable, "-m", "xsave", "--host", target.name, "-q", "--progress", "none"]
        try:
            self._process = subprocess.Popen(
                [
                    *[*command, "migrate-receive", "--transaction", transaction],
                    *["--cpu-mismatch", cpu_mismatch, "--json"],
                ],
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
        self._channel: Channel | None = None
        self._input = self._process.stdin.fileno()
        _widen(self._input)
        self.output = self._process.stdout.fileno()

    def channel(self, compress_level: int | None, bandwidth: float | None) -> Channel:
        """Return the way to it, the only one."""
        self._channel = Channel(self._input, compress_level, bandwidth)
        return self._channel

    def _said(self) -> str:
        self.close()
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def complaint(self) -> str:
        """Return the last thing the receiver said about its failure, "" if nothing."""
        lines = [line for line in self._said()[-_MAX_COMPLAINT:].splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(_COMPLAINT)]
        return (errors or lines or [""])[-1]

    def resumed_ns(self) -> int:
        """Return the guest's wall clock when it began to run there, 0 if nothing was said."""
        said = self._said()
        with contextlib.suppress(ValueError, TypeError, KeyError):
            answer: dict[str, Any] = json.loads(said[said.index("{") :])
            return int(answer["resumed_ns"])
        return 0

    def close(self) -> None:
        """Close both pipes and wait for the process; one that hangs is ended."""
        if self._channel is not None:
            self._channel.close()
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
