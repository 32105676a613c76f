"""A Ctrl-C that has to wait: the guest runs elsewhere, and lives of what is sent from here."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Patience:
    """From begin() to the end of the block, signals that would end this process are only told.

    Without effect in another thread than the main one, which gets no signals."""

    def __init__(self, told: Callable[[], None]) -> None:
        self._told = told
        self._before: dict[signal.Signals, Any] = {}

    def begin(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._wait)

    def _wait(self, _number: int, _frame: FrameType | None) -> None:
        self._told()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
