"""Hosts: a name with a machine, and the domains that run on it.

The frames of a domain whose process is dead are taken back by the next command (`reap`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from xsave.errors import (
    ConnectionLost,
    GuestStateError,
    NameTaken,
    NotFound,
    OutOfFrames,
    StorageError,
    UsageError,
)
from xsave.frames import PAGE_SIZE
from xsave.guest.xen import machine as xen_machine
from xsave.guest.xen.domctl import DomainInfo, Domctl
from xsave.guest.xen.machine import Machine
from xsave.host import paths, registry
from xsave.host.capabilities import capabilities
from xsave.host.registry import (
    DomainRecord,
    alive,
    check_name,
    connect_socket,
    has_ended,
    replace_text,
    write_record,
)
from xsave.host.ssh import find_ssh_host

DEFAULT_HOST = "localhost"
DEFAULT_MEMORY_BYTES = 8 << 30


def open_host(name: str = DEFAULT_HOST) -> Host:
    """Return a host of this machine; localhost is made on first use. Raises NotFound, and
    UsageError for one that is reached through ssh."""
    directory = paths.hosts_directory() / name
    if not (directory / "host.json").exists():
        if name != DEFAULT_HOST:
            raise NotFound(f"no host named {name} (xsave host list shows them)")
        with contextlib.suppress(NameTaken):  # two first commands at the same time
            add_host(name)
    if find_ssh_host(name):
        raise UsageError(f"host {name} is on another machine: this is done there")
    return Host(directory)


def list_hosts() -> list[Host]:
    """Return the hosts of this machine, by name."""
    return [
        Host(directory)
        for directory in sorted(paths.hosts_directory().iterdir())
        if (directory / "host.json").exists() and not find_ssh_host(directory.name)
    ]


def add_host(
    name: str,
    memory_bytes: int | None = None,
    seed: int | None = None,
) -> Host:
    """Make a host with an empty machine. Raises NameTaken, UsageError, StorageError."""
    check_name(name, "host")
    root = paths.hosts_directory()
    seed = int.from_bytes(os.urandom(6)) if seed is None else seed
    if seed < 0 or seed >= 1 << 63:
        raise UsageError(f"seed {seed}: expected 0 to 2^63-1")
    nr_frames = (DEFAULT_MEMORY_BYTES if memory_bytes is None else memory_bytes) // PAGE_SIZE
    making = root / f".{name}.{os.getpid()}"
    making.mkdir(mode=0o700)
    try:
        (making / "domains").mkdir(mode=0o700)
        xen_machine.create_files(making, nr_frames, seed)
        record = {"name": name, "memory_bytes": nr_frames * PAGE_SIZE, "seed": seed}
        (making / "host.json").write_text(json.dumps(record))
        making.rename(root / name)
    except OSError as e:
        shutil.rmtree(making, ignore_errors=True)
        raise NameTaken(f"a host named {name} exists already") from e
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return Host(root / name)


def remove_host(name: str) -> None:
    """Remove a host that runs nothing; forget one of another machine, which is not asked.
    Raises NotFound, GuestStateError."""
    if find_ssh_host(name):
        shutil.rmtree(paths.hosts_directory() / name)
        return
    host = open_host(name)
    with host.registry_lock():
        host.reap()
        if records := host.records():
            names = ", ".join(r.name for r in records)
            raise GuestStateError(f"host {name} still has domains: {names}")
        shutil.rmtree(host.directory)


class Host:
    """One local host. The machine is mapped when first looked at."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            record = json.loads((directory / "host.json").read_text())
        except (OSError, ValueError) as e:
            raise NotFound(f"no host named {directory.name}: {e}") from e
        self.name: str = record["name"]
        self.memory_bytes: int = record["memory_bytes"]
        self.nr_frames = self.memory_bytes // PAGE_SIZE

    @cached_property
    def machine(self) -> Machine:
        return Machine(self.directory, self.name)

    @property
    def free_frames(self) -> int:
        self.settle()
        return self.machine.free_frames()

    # -- the registry of domains ---

    def registry_lock(self) -> AbstractContextManager[None]:
        """registry.registry_lock."""
        return registry.registry_lock(self.directory)

    def records(self) -> list[DomainRecord]:
        """registry.records."""
        return registry.records(self.directory)

    def reap(self) -> None:
        """Take back the frames of domains whose process is dead. Under the registry lock."""
        for directory in list((self.directory / "domains").iterdir()):
            if not directory.name.isdigit() or alive(directory):
                continue
            self.machine.free_domain(int(directory.name))
            shutil.rmtree(directory, ignore_errors=True)

    def settle(self) -> None:
        """Reap, after waiting a moment for domains that are on their way out."""
        for directory in list((self.directory / "domains").iterdir()):
            has_ended(directory)
        with self.registry_lock():
            self.reap()

    def register(self, name: str) -> tuple[int, Path, int]:
        """Reserve a name and a domid; return domid, directory and the locked `alive` fd.

        Raises NameTaken."""
        check_name(name, "domain")
        self.settle()
        with self.registry_lock():
            records = self.records()
            if any(r.name == name for r in records):
                raise NameTaken(f"a domain named {name} exists already on host {self.name}")
            domid = self._next_domid()
            directory = self.directory / "domains" / str(domid)
            directory.mkdir(mode=0o700)
            lock = os.open(directory / "alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_record(directory, name=name, building=True)
        return domid, directory, lock

    def _next_domid(self) -> int:
        """Count up, as Xen does; domids are not used again soon. Under the registry lock."""
        counter = self.directory / "next-domid"
        last = int(counter.read_text()) if counter.exists() else 0
        taken = {int(d.name) for d in (self.directory / "domains").iterdir() if d.name.isdigit()}
        domid = last % 0x7FEF + 1
        while domid in taken:
            domid = domid % 0x7FEF + 1
        replace_text(counter, str(domid))
        return domid

    def forget(self, domid: int, directory: Path) -> None:
        """Undo register(): nothing of the domain is left."""
        self.machine.free_domain(domid)
        shutil.rmtree(directory, ignore_errors=True)

    # -- domains ---

    def domains(self) -> list[DomainInfo]:
        """Return the live domains, by domid."""
        self.settle()
        found = []
        for record in self.records():
            if record.building:
                continue
            with contextlib.suppress(ConnectionLost), self._connect(record) as domctl:
                found.append(domctl.info())
        return found

    def find(self, name_or_domid: str) -> Domctl:
        """Connect to a domain by name, else by domid. Raises NotFound."""
        self.settle()
        records = [r for r in self.records() if not r.building]
        match = [r for r in records if r.name == name_or_domid]
        match = match or [r for r in records if str(r.domid) == name_or_domid]
        if not match:
            raise NotFound(f"no domain named {name_or_domid} on host {self.name}")
        try:
            return self._connect(match[0])
        except ConnectionLost:
            raise NotFound(f"domain {name_or_domid} on host {self.name} has just ended") from None

    def _connect(self, record: DomainRecord) -> Domctl:
        sock = connect_socket(record.directory)
        return Domctl(self.machine, record.domid, record.name, sock)

    def check_room(self, nr_pages: int) -> None:
        """Raise OutOfFrames or StorageError unless there is room for so many more pages.

        Memory is sparse: what other domains were promised and have not touched yet counts, else
        the first touch too many would end in SIGBUS."""
        if nr_pages > (free_frames := self.free_frames):
            raise OutOfFrames(wanted=nr_pages, free=free_frames, host=self.name)
        status = os.statvfs(self.directory)
        free = status.f_bavail * status.f_frsize
        promised = 0
        for host in list_hosts():
            owned = host.machine.nr_frames - host.machine.free_frames()
            resident = (host.directory / "machine.mem").stat().st_blocks * 512
            promised += max(owned * PAGE_SIZE - resident, 0)
        need = nr_pages * PAGE_SIZE
        if need > free - promised:
            raise StorageError(
                f"{self.directory}: the domain needs {need >> 20} MiB of memory and there are "
                f"{max(free - promised, 0) >> 20} MiB left on this filesystem "
                "(set XSAVE_HOME to a directory on a larger tmpfs)"
            )

    def info(self) -> dict[str, Any]:
        """Return what `xsave info` shows."""
        free = self.free_frames
        return {
            "name": self.name,
            "memory_bytes": self.memory_bytes,
            "nr_frames": self.nr_frames,
            "free_frames": free,
            "first_frame": self.machine.first_frame,
            "nr_domains": len(self.records()),
            "directory": str(self.directory),
            **capabilities(self.machine),
        }
