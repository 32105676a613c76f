"""What a migration knows of its target: a way there, messages back, and what it said at the end.

receivers.py has the kinds there are: processes at the end of two pipes, sockets.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

from xsave.errors import ConnectionLost, StorageError
from xsave.host import counting, handshake
from xsave.host.pacing import PacedSink
from xsave.host.sink import DescriptorSink, Sink
from xsave.host.striping import StripingSink
from xsave.image.buffers import Buffer, Zeros

#: A receiver that takes nothing for so long is taken for gone: a link that is cut says nothing.
STALL_TIMEOUT_S = 30.0
_MAX_COMPLAINT = 2000
_COMPLAINT = "xsave: error: "
#: What an ordinary user may ask for (fs.pipe-max-size).
_PIPE_BYTES = 1 << 20
_SAMPLE_BYTES = 64 << 20


class Channel:
    """What is written to the receiver: an image, compressed if asked to, and messages behind it.

    No faster than bandwidth, in bytes a second on the wire. Over several descriptors it goes in
    stripes.
    """

    def __init__(
        self, fds: Sequence[int], compress_level: int | None, bandwidth: float | None
    ) -> None:
        wires = [DescriptorSink(os.dup(fd), "the receiving end", STALL_TIMEOUT_S) for fd in fds]
        self._wire: Sink = wires[0] if len(wires) == 1 else StripingSink(wires)
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
    widen(writing)

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


def widen(fd: int) -> None:
    """Let a pipe hold more; whoever may not have that has a little less speed."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


class Receiver:
    """The far end of a migration: write the image to its `channel`, read its messages from
    `output`.

    is_xsave: it is one, and gives out empty frames, so that an empty page needs no bytes.
    Of others nobody knows; xl's own tools always send the bytes.
    banner_timeout_s: how long it may take until it is there.
    """

    is_xsave = True
    banner_timeout_s = 30.0

    def __init__(self, input_fds: Sequence[int], output_fd: int) -> None:
        self._inputs = input_fds
        self.output = output_fd
        self._channel: Channel | None = None
        self._strange = False

    def channel(self, compress_level: int | None, bandwidth: float | None) -> Channel:
        """Return the way to it, the only one. Raises UsageError if it does not take zstd."""
        self._channel = Channel(self._inputs, compress_level, bandwidth)
        return self._channel

    def greet(self) -> None:
        """Wait until it is there. Raises ConnectionLost, StorageError."""
        self.expect_banner(handshake.receive_line(self.output, "its banner", self.banner_timeout_s))

    def bandwidth(self) -> float | None:
        """Return how many bytes a second get to one that counts (a `probe`), None if this kind
        does not count. Raises StorageError."""
        line = handshake.receive_line(self.output, "its greeting", self.banner_timeout_s)
        self.expect_banner(line, counting.COUNTING)
        return counting.measure(self.channel(None, None), self.output)

    def expect_banner(self, line: bytes, banner: bytes = handshake.BANNER) -> None:
        """Raise StorageError unless this is the banner."""
        if line != banner:
            self._strange = True
            raise StorageError(
                f"the other end: expected its banner, found {line[:100]!r} (nothing there, such as "
                "a start-up file of its shell, may write to standard output)"
            )

    def complaint(self) -> str:
        """Return why it failed, as far as it said anything, "" if it did not."""
        if self._strange:  # what it says after that is a consequence
            return ""
        said = self.said()
        for line in reversed(said[-_MAX_COMPLAINT:].splitlines()):
            if (start := line.find(_COMPLAINT)) >= 0:
                reason = line[start + len(_COMPLAINT) :]
                return "the receiving end said: " + "".join(c for c in reason if c.isprintable())
        return self.silence(said)

    def silence(self, said: str) -> str:
        """Return what is to be thought of a receiver that failed and did not complain as xsave
        does; "" if there is nothing to say."""
        return ""

    def resumed_ns(self) -> int:
        """Return the guest's wall clock when it began to run there, 0 if nothing was said."""
        said = self.said()
        start = 0
        while (start := said.find("{", start)) >= 0:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                answer: dict[str, Any]
                answer, _ = json.JSONDecoder().raw_decode(said[start:])
                return int(answer["resumed_ns"])
            start += 1
        return 0

    def said(self) -> str:
        """End the connection and return what it said beside its messages."""
        raise NotImplementedError

    def close(self) -> None:
        """End the connection, whatever the other end does. What was sent arrives."""
        if self._channel is not None:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
