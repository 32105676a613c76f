"""One OS process per domain: it owns the vCPUs and does what the control socket asks.

    python -m xsave.host.process HOST_DIRECTORY FD [KERNEL]

It is started detached, waits at the socket FD until it is told its domain (prestart.py) and then
has no descriptor but the listening socket, the locked `alive` file and its log; and, for a lazy
restore, the image. KERNEL is what it will probably be built from: that is unpacked beside all else
that has to be done before.

What takes time to import is imported here when that has begun. loop.py is what it does then.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
from pathlib import Path

from xsave.errors import ConnectionLost
from xsave.host.prestart import receive_identity
from xsave.host.unpacking import Unpacking


def main(arguments: list[str]) -> None:
    host_directory, fd, *kernel = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    unpacking = Unpacking(kernel[0]) if kernel else None
    gc.disable()  # nothing of what is imported is garbage
    from xsave.host import loop

    gc.freeze()
    gc.enable()
    try:
        identity, (listener, alive, log, *lazy) = receive_identity(int(fd), 3, 6)
    except ConnectionLost:
        return
    _log_to(log)
    faulthandler.register(signal.SIGUSR1)  # where does it hang? the answer is in process.log
    descriptors = [listener, alive, *lazy]
    loop.live(Path(host_directory), identity["domid"], identity["name"], descriptors, unpacking)


def _log_to(fd: int) -> None:
    """The command's standard error belongs to its terminal or its pipe: let go of it."""
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


if __name__ == "__main__":
    main(sys.argv[1:])
