"""What `migrate --to xl:COMMAND` runs: stdin and stdout of dom0's port. `bridge.py SOCKET MARK`

MARK is a file that appears once the port is connected: before that, dom0 reads its end.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path


def copy(sock):
    """Give out what comes from dom0."""
    while data := sock.recv(1 << 16):
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]


def main(path, mark):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    Path(mark).touch()
    threading.Thread(target=copy, args=(sock,), daemon=True).start()
    while data := os.read(0, 1 << 16):
        sock.sendall(data)


main(*sys.argv[1:])
