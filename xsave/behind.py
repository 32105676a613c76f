"""Work behind one's back: calls of one function, in order, by a thread, while the caller goes on.

System calls and compressors run without the GIL: so a save looks at the next pages while the
last ones are written, and a restore reads on while pages are put into frames. What a call is
given must stay as it is until the call is over; how much of it waits is bounded in bytes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

#: How long the end of a failed `with` block waits for a call under way.
_ABANDON_WAIT_S = 1.0


class Behind:
    """Calls under way. What one raises is raised by the next, or by `finish`; none follows it."""

    def __init__(self, call: Callable[..., None], max_waiting_bytes: int) -> None:
        self._call = call
        self._max_bytes = max_waiting_bytes
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, tuple[Any, ...]]] = deque()
        self._nbytes = 0  # of the calls that wait and the one under way
        self._error: BaseException | None = None
        self._ends = False
        # A daemon: a call that never returns (a pipe nobody reads) must not keep the process.
        self._thread = threading.Thread(target=self._run, name="behind", daemon=True)

    def __call__(self, nbytes: int, *arguments: Any) -> None:
        """Have the call made; wait first until there is room for nbytes, or nothing waits."""
        if self._thread.ident is None:
            self._thread.start()
        with self._changed:
            while self._error is None and self._nbytes and self._nbytes + nbytes > self._max_bytes:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            self._waiting.append((nbytes, arguments))
            self._nbytes += nbytes
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """True if no call waits or is under way."""
        return self._nbytes == 0

    def finish(self) -> None:
        """Wait for all calls and end the thread."""
        self._end()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def abandon(self, seconds: float | None = None) -> None:
        """Drop the calls that wait, and wait for the one under way, so long at most."""
        with self._changed:
            self._waiting.clear()
        self._end(seconds)
        self._error = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self.abandon(_ABANDON_WAIT_S)  # nothing is left of it when all went well

    def _end(self, seconds: float | None = None) -> None:
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        self._call = _nothing  # often a method of who holds us: no circle keeps its memory

    # -- the thread ---

    def _run(self) -> None:
        call = self._call
        while (job := self._next()) is not None:
            nbytes, arguments = job
            error: BaseException | None = None
            try:
                call(*arguments)
            except BaseException as problem:  # noqa: BLE001 - raised where it is waited for
                error = problem
            self._done(nbytes, error)

    def _next(self) -> tuple[int, tuple[Any, ...]] | None:
        with self._changed:
            while not self._waiting and not self._ends:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None

    def _done(self, nbytes: int, error: BaseException | None) -> None:
        with self._changed:
            self._nbytes -= nbytes
            if error is not None:
                self._error = error
                self._waiting.clear()
                self._ends = True
            self._changed.notify_all()


def _nothing(*_: Any) -> None:
    """What is called when all is over."""
