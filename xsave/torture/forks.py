"""Children of this process: one for each try, so that a try changes nothing.

A fork is a snapshot of the laboratory, its translated code included. No child outlives its
parent, however that ends, and none leaves anything but its answer.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
from collections.abc import Callable
from typing import NoReturn, TypeVar

from xsave.errors import GuestStateError, XsaveError

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1
_GOOD, _REFUSED, _BUG = range(3)
_libc = ctypes.CDLL(None, use_errno=True)


def start(function: Callable[[], object]) -> tuple[int, int]:
    """Run function in a child; return its pid and the descriptor its answer comes from."""
    parent = os.getpid()
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        _child(parent, into, function)
    os.close(into)
    return pid, out


def _child(parent: int, into: int, function: Callable[[], object]) -> NoReturn:
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            with os.fdopen(into, "wb") as stream:
                pickle.dump(_outcome(function), stream)
    finally:
        os._exit(0)


def _outcome(function: Callable[[], object]) -> tuple[int, object]:
    try:
        return _GOOD, function()
    except XsaveError as problem:
        return _REFUSED, str(problem)
    except BaseException as problem:  # noqa: BLE001 - raised again where the answer is wanted
        import traceback

        return _BUG, "".join(traceback.format_exception(problem))


def answer(pid: int, out: int) -> object:
    """Wait for a child; return what its function returned. Raises GuestStateError."""
    with os.fdopen(out, "rb") as stream:
        data = stream.read()
    os.waitpid(pid, 0)
    if not data:
        raise GuestStateError(f"process {pid} of the torture was killed")
    kind, value = pickle.loads(data)
    if kind == _REFUSED:
        raise GuestStateError(value)
    if kind == _BUG:
        raise RuntimeError(value)
    return value


def in_child(function: Callable[[], T]) -> T:
    """Return what function returns in a child of its own."""
    return answer(*start(function))  # type: ignore[return-value]
