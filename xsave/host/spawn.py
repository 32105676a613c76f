"""Give a new domain its process: the toolstack's side of host/process.py.

It imports nothing of the emulator, so that the command is ready long before the process is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence

from xsave.errors import ConnectionLost, StorageError
from xsave.guest.xen.domctl import Domctl
from xsave.host.host import Host
from xsave.host.prestart import WaitingProcess
from xsave.host.registry import connect_socket, socket_address

_MAIN = threading.main_thread()


def spawn(
    host: Host,
    name: str,
    process: WaitingProcess | None = None,
    lazy: Sequence[int] = (),
) -> Domctl:
    """Register a domain for a process, started here if none waits; return the connection that
    builds it. lazy: of a lazy restore the descriptors of the image and of the Outstanding tables.

    Raises NameTaken, StorageError. Closing the connection before commit() undoes everything.
    """
    waiting: list[int] = []
    with _interrupts_noted(waiting):
        domctl = _spawn(host, name, process, lazy)
    if waiting:
        domctl.abandon()
        raise KeyboardInterrupt
    return domctl


@contextlib.contextmanager
def _interrupts_noted(waiting: list[int]) -> Iterator[None]:
    """A Ctrl-C waits: behind this there is either nothing, or a domain that can be given up. (To
    block the signal is not enough, as another thread may take it.)"""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not _MAIN:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, _frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _spawn(host: Host, name: str, process: WaitingProcess | None, lazy: Sequence[int]) -> Domctl:
    domid, directory, alive = host.register(name)
    try:
        with socket_address(directory) as address:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(address)
            listener.listen(16)
        process = process or WaitingProcess(host.directory)
        with listener, (directory / "process.log").open("wb") as log:
            # Connected before the process is told: from then on it hears of our death.
            sock = connect_socket(directory)
            try:
                given = [listener.fileno(), alive, log.fileno(), *lazy]
                process.become({"domid": domid, "name": name}, given)
            except BaseException:
                sock.close()
                raise
        return Domctl(host.machine, domid, name, sock)
    except (OSError, ConnectionLost) as e:
        host.forget(domid, directory)
        raise StorageError(f"cannot start the domain's process: {e}") from e
    finally:
        os.close(alive)
