"""Write-behind: buffers are written, in order, by a thread, while the next ones are prepared.

System calls and compressors work without the GIL, so looking at the next batch of pages and
writing the last one take two cores. A buffer must stay as it is until it is written: at most
`depth` calls ago, or until the block ends.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

from xsave.image.buffers import Buffer, Write

#: How long an abort waits for a write under way. One that hangs (a pipe nobody reads) is left to
#: itself: the thread is a daemon and ends with the process.
_ABORT_WAIT_S = 1.0


class WriteBehind:
    """A `write` callable that returns before the data are written.

    What a write raises is raised by a later call or by the end of the `with` block; nothing is
    written after it.
    """

    def __init__(self, write: Write, depth: int) -> None:
        self._write = write
        self._queue: queue.Queue[list[Buffer] | None] = queue.Queue(depth - 1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if error is not None:
            self._error = self._error or error  # write nothing more
            self._abandon()
            return
        self._queue.put(None)
        self._thread.join()
        self._raise()

    def __call__(self, buffers: Iterable[Buffer]) -> None:
        """Have these buffers written behind all that were given before."""
        self._raise()
        self._queue.put(list(buffers))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (buffers := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._write(buffers)
                except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                    self._error = error

    def _abandon(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._queue.put(None)  # there is room now: nobody else puts anything
        self._thread.join(_ABORT_WAIT_S)
