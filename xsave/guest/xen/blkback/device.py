"""One block device of a domain: its nodes in the store and its frontend's comings and goings.

    frontend   Initialising    Initialised      Connected     Closing    Closed
    backend    InitWait        Connected                      Closing    Closed, then InitWait

The frontend's state is watched; what it grants and the port it offers are taken when it says that
it is Initialised. All of this happens in the vCPU thread. A guest that went through a cancelled
suspend goes on with the same ring; a restored one finds a new backend that waits for it.
Mirrors drivers/block/xen-blkback/xenbus.c; the nodes are those of libxl's device_disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xsave.errors import GuestStateError
from xsave.guest.xen.blkback.disk import Disk, Vbd
from xsave.guest.xen.blkback.requests import SECTOR_BYTES, Job, Mapper, Refused
from xsave.guest.xen.blkback.ring import BackRing, Request
from xsave.guest.xen.domain import Domain
from xsave.guest.xen.events import Port
from xsave.guest.xen.grants import Grant

(
    _UNKNOWN, _INITIALISING, _INIT_WAIT, _INITIALISED, _CONNECTED, _CLOSING, _CLOSED,
) = range(7)  # fmt: skip
_PROTOCOL = b"x86_64-abi"
_M32 = 0xFFFFFFFF


@dataclass(slots=True)
class _Connection:
    """What is there while a frontend is connected."""

    ring: BackRing
    page: Grant
    port_number: int
    port: Port
    mapper: Mapper


class BlockDevice:
    """The backend of one device, for as long as its domain lives.

    submit(job) has job.run(disk) done and complete(job) called; forget_code() is called when
    bytes came to where the guest's code may be.
    """

    def __init__(
        self,
        domain: Domain,
        vbd: Vbd,
        disk: Disk,
        submit: Callable[[Job], None],
        forget_code: Callable[[], None],
    ) -> None:
        self._domain = domain
        self._vbd = vbd
        self._disk = disk
        self._submit = submit
        self._forget_code = forget_code
        self._front = f"{domain.home}/device/vbd/{vbd.devid}"
        self._back = f"/local/domain/0/backend/vbd/{domain.domid}/{vbd.devid}"
        self._state = _INITIALISING
        self._connection: _Connection | None = None
        self.nr_in_flight = 0

    # -- the store ---

    def plug(self) -> None:
        """Write the nodes, and wait for the frontend."""
        vbd, store, domid = self._vbd, self._domain.store, self._domain.domid
        kind = "cdrom" if vbd.cdrom else "disk"
        front = {
            "backend": self._back, "backend-id": 0, "state": _INITIALISING,
            "virtual-device": vbd.devid, "device-type": kind,
        }  # fmt: skip
        back = {
            "frontend": self._front, "frontend-id": domid, "online": 1,
            "removable": int(vbd.cdrom), "bootable": 1, "dev": vbd.name, "type": "qdisk",
            "mode": "r" if vbd.readonly else "w", "device-type": kind, "params": vbd.params,
            "feature-flush-cache": 1, "feature-persistent": 1,
        }  # fmt: skip
        for path, nodes in ((self._back, back), (self._front, front)):
            for node, value in nodes.items():
                store.write(f"{path}/{node}", str(value))
        self._switch(_INIT_WAIT)
        store.watch(f"{self._front}/state", lambda _path: self._frontend_changed())

    def _switch(self, state: int) -> None:
        self._state = state
        self._domain.store.write(f"{self._back}/state", str(state))

    def _read(self, node: str) -> bytes:
        return self._domain.store.read(f"{self._front}/{node}") or b""

    def _number(self, node: str) -> int:
        """A node's decimal number, -1 if it is none."""
        text = self._read(node)
        return int(text) if text.isdigit() and len(text) <= len(str(_M32)) else -1

    def _frontend_changed(self) -> None:
        if self._connection is not None and self._state != _CONNECTED:
            return  # the old one is still in flight; looked at again when it is not
        state = self._number("state")
        if state == _INITIALISING and self._state == _CLOSED:
            self._switch(_INIT_WAIT)
        elif state in (_INITIALISED, _CONNECTED) and self._state == _INIT_WAIT:
            self._connect()
        elif state == _CLOSING and self._state in (_INIT_WAIT, _CONNECTED):
            self._disconnect(_CLOSING)
        elif state not in range(_INITIALISING, _CLOSING + 1) and self._state != _CLOSED:
            self._disconnect(_CLOSED)

    def _fail(self, why: str) -> None:
        """xenbus_dev_fatal: the guest may read what was wrong; the device is of no use to it."""
        self._domain.store.write(f"/local/domain/0/error/{self._back[16:]}/error", why)
        self._disconnect(_CLOSING)

    # -- a frontend ---

    def _connect(self) -> None:
        domain, store = self._domain, self._domain.store
        protocol = self._read("protocol")
        if protocol not in (b"", _PROTOCOL):
            self._fail(f"protocol {protocol[:20]!r}: only {_PROTOCOL.decode()} is spoken here")
            return
        number = self._number("event-channel")
        port = domain.events.ports.get(number)
        if port is None or port.kind != "unbound" or port.remote_domid != 0:
            self._fail("event-channel is no port that waits for domain 0")
            return
        page = domain.grants.map(self._number("ring-ref"), readonly=False)
        if isinstance(page, int):
            self._fail(f"ring-ref cannot be mapped ({page})")
            return
        port.kind, port.notify = "interdomain", self.serve
        persistent = self._number("feature-persistent") == 1
        mapper = Mapper(domain.grants, persistent=persistent)
        ring = BackRing(domain.grants.page(page))
        self._connection = _Connection(ring, page, number, port, mapper)
        nodes = {
            "sectors": self._disk.nr_sectors, "info": self._vbd.info,
            "sector-size": SECTOR_BYTES, "physical-sector-size": SECTOR_BYTES,
        }  # fmt: skip
        for node, value in nodes.items():
            store.write(f"{self._back}/{node}", str(value))
        self._switch(_CONNECTED)
        self.serve()

    def _disconnect(self, state: int) -> None:
        """Let go of the frontend, as soon as nothing of it is in flight; then be in `state`."""
        self._state = state
        if not self.nr_in_flight:
            self._release()
            self._switch(state)

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection.mapper.release()
        self._domain.grants.unmap(connection.page)
        if self._is_bound(connection):
            connection.port.kind, connection.port.notify = "unbound", None

    def _is_bound(self, connection: _Connection) -> bool:
        """False if the guest closed the port; its number may be another's by now."""
        return self._domain.events.ports.get(connection.port_number) is connection.port

    # -- requests ---

    def serve(self) -> None:
        """Take what is in the ring; the guest has sent an event."""
        connection = self._connection
        if connection is None or self._state != _CONNECTED:
            return
        try:
            while (request := connection.ring.take()) is not None:
                self._start(connection, request)
        except GuestStateError as e:
            self._fail(str(e))

    def _start(self, connection: _Connection, request: Request) -> None:
        try:
            job = connection.mapper.prepare(request, self._disk)
        except Refused as refused:
            self._respond(connection, request, refused.status)
            return
        self.nr_in_flight += 1
        self._submit(job)

    def complete(self, job: Job) -> None:
        """A job was done: answer its request."""
        self.nr_in_flight -= 1
        connection = self._connection
        assert connection is not None  # it stays while anything is in flight
        status = connection.mapper.finish(job)
        if connection.mapper.dirtied:
            connection.mapper.dirtied = False
            self._forget_code()
        if self._state == _CONNECTED:
            self._respond(connection, job.request, status)
        elif not self.nr_in_flight:
            self._disconnect(self._state)
            self._frontend_changed()

    def _respond(self, connection: _Connection, request: Request, status: int) -> None:
        if connection.ring.respond(request, status) and self._is_bound(connection):
            self._domain.events.set_pending(connection.port_number)
