"""The toolstack's door to a domain of the laboratory: domctl without a socket and a process.

save and restore are the real ones; what they ask of a domain's process is done on the spot by the
same handlers (xsave.host.building).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, cast

from xsave.guest.xen.conversation import Pending
from xsave.guest.xen.domctl import DomainInfo, Domctl
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.machine import XEN_FRAMES
from xsave.host.building import Answer, Building
from xsave.host.control import Client, Control, Request
from xsave.host.running import RunningDomain
from xsave.torture.machine import PrivateMachine


class Ear:
    """What a domain writes to its console: all of it, in memory."""

    def __init__(self) -> None:
        self.heard = bytearray()

    def console_output(self, data: bytes) -> None:
        self.heard += data

    def resume_input(self) -> None:
        """Nobody types here."""

    @property
    def text(self) -> str:
        return self.heard.decode(errors="replace")


class Door(Domctl):
    """A domain by its machine and the handlers of its requests. It never lets the guest run."""

    machine: PrivateMachine

    def __init__(self, machine: PrivateMachine, domid: int, name: str) -> None:
        self._nobody = socket.socket()
        super().__init__(machine, domid, name, self._nobody)
        self.ear = Ear()
        control = cast(Control, self.ear)  # all that building a domain asks of it
        self._running = RunningDomain(machine.directory, machine, domid, name, control)
        self._building = Building(self._running)
        self._client = Client(self._nobody)

    @property
    def xen(self) -> Hypervisor:
        return self._running.xen

    def _post(self, op: str, blob: bytes = b"", **arguments: Any) -> Pending:
        handler: Callable[[Request], Answer] = getattr(self._building, "op_" + op)
        pending = Pending(lambda on_event: None)
        pending.answer = handler(Request(self._client, op, arguments, blob))
        return pending

    def begin(
        self,
        *,
        nr_vcpus: int,
        max_pages: int,
        target_pages: int | None = None,
        available_vcpus: frozenset[int] | None = None,
        deterministic: bool = False,
        builtin: bool = False,
        disks: Sequence[object] = (),
        disks_later: bool = False,
        warm: bool = False,
        seed: int | None = None,
    ) -> None:
        """Make the empty domain, in virtual time whatever its image says."""
        answer, _ = self._call(
            "begin",
            nr_vcpus=nr_vcpus,
            max_pages=max_pages,
            target_pages=max_pages if target_pages is None else target_pages,
            deterministic=True,
            builtin=builtin,
            disks=list(disks),
            disks_later=disks_later,
            xen_frames=self.populate(XEN_FRAMES).tolist(),
        )
        self._shared_info_mfn = answer["shared_info_mfn"]

    def suspend(self, on_stage: Callable[[str], None]) -> None:
        """It has suspended already: that is when this door is used."""

    def ask_commit(self) -> Callable[[], object]:
        self._building.committed = True
        return lambda: None

    def info(self) -> DomainInfo:
        domain = self.xen.domain
        nr = self.machine.nr_frames
        return DomainInfo(
            name=self.name,
            domid=self.domid,
            host=self.machine.name,
            state="paused",
            vcpus=len(domain.vcpus),
            memory_bytes=domain.max_pages << 12,
            min_mfn=0,
            max_mfn=nr - 1,
            online_vcpus=sum(vcpu.online for vcpu in domain.vcpus),
        )

    def destroy(self) -> None:
        """Nothing: the domain goes with the process, or by `remove`."""

    def resume(self, *, paused: bool = False) -> None:
        """Let the suspended guest go on: its hypercall returns 1."""
        self.xen.set_result(1)
        self.xen.domain.shutdown_reason = None

    def abandon(self) -> None:
        """Nothing: see destroy."""

    def close(self) -> None:
        """The door stays: the laboratory goes on with the domain."""
