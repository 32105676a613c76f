"""Start the process of a new domain: the toolstack's side of host/process.py.

It imports nothing of the emulator, so that the command is ready long before the process is.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from xsave.errors import ConnectionLost, StorageError
from xsave.guest.xen.domctl import Domctl
from xsave.host.host import Host
from xsave.host.registry import connect_socket, socket_address

PROCESS_MODULE = "xsave.host.process"


def spawn(host: Host, name: str) -> Domctl:
    """Register a domain and start its process; return the connection that builds it.

    Raises NameTaken, StorageError. Closing the connection before commit() undoes everything.
    """
    domid, directory, alive = host.register(name)
    try:
        with socket_address(directory) as address:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(address)
            listener.listen(16)
        with (directory / "process.log").open("wb") as log:
            subprocess.Popen(
                [
                    sys.executable, "-m", PROCESS_MODULE, str(host.directory), str(domid), name,
                    str(listener.fileno()), str(alive),
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
                start_new_session=True, pass_fds=(listener.fileno(), alive),
                env=_environment(),
            )  # fmt: skip
        sock = connect_socket(directory)
        listener.close()
        return Domctl(host.machine, domid, name, sock)
    except (OSError, ConnectionLost) as e:
        host.forget(domid, directory)
        raise StorageError(f"cannot start the domain's process: {e}") from e
    finally:
        os.close(alive)


def _environment() -> dict[str, str]:
    """Let the child find this very package, installed or not; one thread per numpy is enough."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {
        "PYTHONPATH": f"{root}:{path}" if path else root,
        "OPENBLAS_NUM_THREADS": "1",
    }
