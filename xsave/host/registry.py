"""A host's domains: of each its directory, its record, its control socket, and whether its process
lives.

domains/DOMID holds domain.json (the name; `building` until the domain is whole), `ctl` (the
control socket), console.log, and `alive`, on which the process holds a lock for life: whether it
is dead is asked of the kernel, not of a pid.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xsave.errors import ConnectionLost, UsageError
from xsave.filelock import exclusive, is_locked

#: How long the process of a domain that is given up may take to go.
_DYING_WAIT_S = 10.0
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,62}\Z")


def check_name(name: str, what: str) -> None:
    """Raise UsageError unless a host or a domain may have this name."""
    if not NAME_PATTERN.match(name):
        raise UsageError(
            f"{what} name {name!r}: expected a letter or digit, then letters, digits, _ . + -"
        )


@dataclass(frozen=True)
class DomainRecord:
    """domains/DOMID/domain.json: the name under which a domain can be found."""

    name: str
    domid: int
    directory: Path
    building: bool


def registry_lock(host_directory: Path) -> AbstractContextManager[None]:
    """Domids and names of a host are given out under this lock."""
    return exclusive(host_directory / "registry")


def records(host_directory: Path) -> list[DomainRecord]:
    """Return a host's registered domains, by domid; dead ones included until reaped."""
    found = []
    for directory in (host_directory / "domains").iterdir():
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = json.loads((directory / "domain.json").read_text())
            building = record.get("building", False)
            found.append(DomainRecord(record["name"], int(directory.name), directory, building))
    return sorted(found, key=lambda r: r.domid)


def alive(directory: Path) -> bool:
    """True while some process holds the domain's `alive` lock."""
    return is_locked(directory / "alive")


def ending(directory: Path) -> bool:
    """True while the process of a domain that is given up still lives.

    Either file may go first when the directory is removed."""
    given_up = (directory / "dying").exists() or not (directory / "domain.json").exists()
    return given_up and alive(directory)


def has_ended(directory: Path) -> bool:
    """Return whether a domain's process is gone, after waiting a moment for one on its way out."""
    deadline = time.monotonic() + _DYING_WAIT_S
    while ending(directory) and time.monotonic() < deadline:
        time.sleep(0.002)
    return not alive(directory)


def replace_text(path: Path, text: str) -> None:
    """Write a small file that is whole at any moment, whoever is killed. One writer at a time."""
    making = path.with_name(f".{path.name}")
    making.write_text(text)
    making.rename(path)


def write_record(directory: Path, **record: Any) -> None:
    """Write domain.json, atomically."""
    replace_text(directory / "domain.json", json.dumps(record))


@contextlib.contextmanager
def socket_address(directory: Path) -> Iterator[str]:
    """The control socket's address, short enough for any directory (sun_path holds 108 bytes)."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/ctl"
    finally:
        os.close(fd)


def connect_socket(directory: Path) -> socket.socket:
    """Connect to a domain process. Raises ConnectionLost."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket_address(directory) as address:
            sock.connect(address)
    except OSError as e:
        sock.close()
        raise ConnectionLost(f"the domain's process does not answer: {e.strerror}") from e
    return sock
