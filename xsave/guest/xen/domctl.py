"""The toolstack's only door to a domain, shaped like Xen's own domctl.

The flows (save, restore, migrate) see the class Domctl and nothing else of the guest. Bulk data
never crosses the socket: frames, page types and the m2p are read in place through the mapped
machine, as libxc maps foreign frames; the control socket carries small requests to the domain
process, which owns the vCPUs. A connection is also a lease: when the one that suspended the
guest, or the one that builds the domain, is closed without a word, the domain process undoes it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xsave.errors import ConnectionLost, XsaveError
from xsave.frames import PAGE_SHIFT, TYPE_PIN
from xsave.guest.xen.conversation import Conversation, Pending
from xsave.guest.xen.logdirty import COMPARE, KINDS, CompareLog, LogDirty, WrittenLog
from xsave.guest.xen.machine import XEN_FRAMES, Machine
from xsave.guest.xen.wire import pack_blobs, receive_exact, unpack_blobs

_TABLE_LEVELS = 4
#: What log_dirty() takes: the best there is, or this one.
DIRTY_LOGS = ("auto", *KINDS)
_ABANDON_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class DomainInfo:
    """What `xsave list` shows of a domain."""

    name: str
    domid: int
    host: str
    state: str  # running, paused, suspended, shutdown, crashed
    vcpus: int
    memory_bytes: int
    min_mfn: int
    max_mfn: int
    online_vcpus: int


@dataclass(frozen=True)
class VcpuState:
    """One vCPU as the image's records hold it, with mfns where Xen has mfns."""

    vcpu_id: int
    context: bytes
    extended: bytes
    xsave: bytes
    msrs: bytes


@dataclass(frozen=True)
class DomainState:
    """What a save needs of a domain beside frames and vCPUs.

    p2m_frames and start_info_mfn are known for a domain that was restored and has never run
    (else the guest publishes them); `config` is the xl JSON; tsc is (mode, khz, nsec,
    incarnation).
    """

    never_run: bool
    nr_vcpus: int
    max_pages: int
    shared_info_mfn: int
    tsc: tuple[int, int, int, int]
    config: bytes
    cpuid_policy: bytes
    msr_policy: bytes
    p2m_frames: np.ndarray | None
    p2m_size: int
    xen_version: tuple[int, int]


class Domctl:
    """One domain, by its mapped machine and a connection to its process.

    What takes the process its time can be asked for ahead: ask_x() sends the request and returns
    what waits for its answer.
    """

    def __init__(self, machine: Machine, domid: int, name: str, sock: socket.socket) -> None:
        self.machine = machine
        self.domid = domid
        self.name = name
        self._sock = sock
        self._conversation = Conversation(sock)
        self._begin: Pending | None = None  # begin() was sent, its answer not yet read
        self._shared_info_mfn = 0
        self._frame_order: int | None = None
        self.suspended_ns = self.resumed_ns = 0
        #: The file where the domain's process writes down what it does to the copy of a
        #: migration, before it does it (host/handover/journal.py).
        self.journal: str | None = None

    def __enter__(self) -> Domctl:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the connection; a suspend or a build it holds is undone by the process."""
        with contextlib.suppress(OSError):
            self._sock.close()

    def _call(
        self,
        op: str,
        blob: bytes = b"",
        on_event: Callable[[str], None] | None = None,
        **arguments: Any,
    ) -> tuple[dict[str, Any], bytes]:
        return self._post(op, blob, **arguments).wait(on_event)

    def _post(self, op: str, blob: bytes = b"", **arguments: Any) -> Pending:
        self._begun()
        return self._conversation.ask(op, blob, arguments)

    # -- life ---

    def info(self) -> DomainInfo:
        message, _ = self._call("info")
        return self._info(message)

    def _info(self, message: dict[str, Any]) -> DomainInfo:
        mfns = np.flatnonzero(self.machine.owner == self.domid)
        return DomainInfo(
            name=self.name,
            domid=self.domid,
            host=self.machine.name,
            state=message["state"],
            vcpus=message["vcpus"],
            memory_bytes=max(int(mfns.size - message["xen_frames"]), 0) << PAGE_SHIFT,
            min_mfn=int(mfns[0]) if mfns.size else 0,
            max_mfn=int(mfns[-1]) if mfns.size else 0,
            online_vcpus=message["online_vcpus"],
        )

    def pause(self) -> None:
        self._call("pause")

    def unpause(self) -> DomainInfo:
        """Let it run; return what it is from then on. resumed_ns is the guest's wall clock then."""
        message, _ = self._call("unpause")
        return self._started(message)

    def take_over(self, name: str) -> DomainInfo:
        """Make the guest of a migration's copy: it opens the disks that begin() left to others,
        gets this name, and runs; as unpause(). What fails leaves undone what comes behind it.

        Raises StorageError, NameTaken."""
        message, _ = self._call("takeover", name=name)
        self.name = name
        return self._started(message)

    def _started(self, message: dict[str, Any]) -> DomainInfo:
        self.resumed_ns = int(message["resumed_ns"])
        return self._info(message)

    def destroy(self) -> None:
        """End the domain; its frames are free and its process gone when this returns or soon."""
        self._call("destroy", journal=self.journal)

    def shutdown(self, reason: str) -> None:
        """Ask the guest (control/shutdown) to power off or reboot."""
        self._call("shutdown", reason=reason)

    def set_target(self, nr_pages: int) -> None:
        """Ask the guest's balloon driver (memory/target) to have so many pages; it takes its
        time. Raises UsageError if the domain may not have as many."""
        self._call("target", nr_pages=nr_pages)

    def set_available_vcpus(self, number: int) -> None:
        """Ask the guest (cpu/N/availability) to use its first vCPUs only; it takes its time.
        Raises UsageError if it does not have as many."""
        self._call("vcpus", number=number)

    def suspend(self, on_stage: Callable[[str], None]) -> None:
        """Ask the guest to suspend and wait until it has; `on_stage` hears the steps.

        Raises SuspendFailed; the guest then runs on. A domain restored paused that never ran is
        suspended as it is, without a handshake. suspended_ns is the guest's wall clock at its
        suspend, as Xen gives it to the guest (wc_* of shared_info and the system time), 0 if it
        never ran.
        """
        self.ask_suspend()(on_stage)

    def ask_suspend(self) -> Callable[[Callable[[str], None]], None]:
        """suspend(), asked ahead; what is asked for behind it is answered as soon as the guest is
        suspended, or could not be."""
        pending = self._post("suspend")

        def wait(on_stage: Callable[[str], None]) -> None:
            message, _ = pending.wait(on_stage)
            self.suspended_ns = int(message.get("suspended_ns", 0))

        return wait

    def resume(self, *, paused: bool = False) -> None:
        """Let a suspended guest go on in place; its hypercall returns 1 (cancelled)."""
        self._call("resume", paused=paused, journal=self.journal)

    def hold(self) -> None:
        """Keep a suspended guest suspended even if this connection dies: another copy of it may
        be running. From here on only resume(), unpause() or destroy() decide."""
        self._call("hold", journal=self.journal)

    def console_attach(self) -> socket.socket:
        """Turn this connection into the guest's console: a raw two-way byte stream."""
        self._call("console")
        return self._sock

    def console_log(self) -> bytes:
        """Return the newest part of what the guest ever wrote to its console."""
        path = self.machine.directory / "domains" / str(self.domid) / "console.log"
        return path.read_bytes() if path.exists() else b""

    # -- state, for a save ---

    def state(self) -> DomainState:
        return self.ask_state()()

    def ask_state(self) -> Callable[[], DomainState]:
        """state(), asked ahead."""
        pending = self._post("getstate")

        def answer() -> DomainState:
            message, blob = pending.wait()
            config, cpuid, msrs, p2m = unpack_blobs(blob, 4)
            return DomainState(
                never_run=message["never_run"],
                nr_vcpus=message["nr_vcpus"],
                max_pages=message["max_pages"],
                shared_info_mfn=message["shared_info_mfn"],
                tsc=tuple(message["tsc"]),
                config=config,
                cpuid_policy=cpuid,
                msr_policy=msrs,
                p2m_frames=np.frombuffer(p2m, np.uint64) if p2m else None,
                p2m_size=message["p2m_size"],
                xen_version=tuple(message["xen_version"]),
            )

        return answer

    def vcpus(self) -> list[VcpuState]:
        """Return the online vCPUs, ascending; registers as they are now."""
        return self.ask_vcpus()()

    def ask_vcpus(self) -> Callable[[], list[VcpuState]]:
        """vcpus(), asked ahead."""
        pending = self._post("getvcpus")

        def answer() -> list[VcpuState]:
            message, blob = pending.wait()
            parts = list(unpack_blobs(blob, 4 * len(message["ids"])))
            return [
                VcpuState(vcpu_id, *parts[4 * i : 4 * i + 4])
                for i, vcpu_id in enumerate(message["ids"])
            ]

        return answer

    def page_types(self, mfns: np.ndarray) -> np.ndarray:
        """Return (n,) u8 libxc types (levels with the pin bit, NOTAB for all else) of u64 mfns."""
        machine, frames = self.machine, mfns.view(np.int64)  # other indices cost twice as much
        found = machine.page_type.take(frames)
        tables = np.flatnonzero(found - np.uint8(1) < _TABLE_LEVELS)
        frames = frames[tables]
        levels = found[tables]
        levels[machine.pinned[frames] != 0] |= np.uint8(TYPE_PIN)
        levels[machine.type_count[frames] == 0] = 0
        types = np.zeros(mfns.size, np.uint8)
        types[tables] = levels
        return types

    def owned(self, mfns: np.ndarray) -> np.ndarray:
        """Return (n,) bool: which mfns are frames of this domain that it may name."""
        inside = mfns < self.machine.nr_frames
        safe = np.where(inside, mfns, 0)
        return inside & (self.machine.owner[safe] == self.domid)

    # -- the log of dirty frames, for a migration ---

    def log_dirty(self, kind: str = "auto") -> LogDirty:
        """Turn the log on (XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY): userfaultfd, compare or auto.

        It ends with this connection at the latest. Raises GuestStateError if another has it,
        StorageError if this kind cannot be had.
        """
        message, _ = self._call("logdirty", action="enable", kind=kind)

        def ask(action: str) -> Callable[[], bytes]:
            pending = self._post("logdirty", action=action)
            return lambda: pending.wait()[1]

        if message["kind"] == COMPARE:
            return CompareLog(self.machine, self.domid, ask)
        return WrittenLog(self.machine, ask)

    def mark_dirty(self, mfns: np.ndarray) -> None:
        """Say that frames of a running domain were written through a mapping that is not its
        process's: the log does not see that by itself."""
        self._call("logdirty", mfns.astype("<u8").tobytes(), action="mark")

    def throttle(self, percent: int) -> None:
        """Let the vCPUs rest for so much of the time, while the log of this connection is on."""
        self._call("throttle", percent=percent)

    # -- building, for a restore ---

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
        """Make the empty domain; a ballooned guest keeps to target_pages, and one
        with vCPUs offline to available_vcpus (all, if None).

        disks: as a libxl_domain_config has them; they are opened here, or, with disks_later, only
        looked at: take_over() opens them. warm: there is time now for what the first run needs.

        The built-in kernel leaves no frame number behind, so its images are the same whatever
        frames it had. Linux does, in stacks and in pages that it uses no more: for two of its
        images to be the same the frames must be, so that with a seed they follow from that.

        Raises OutOfFrames. This does not wait for the domain's process, which takes its time to
        start and is not needed to fill frames. (So Xen's frames are taken here: the same seed
        gives the same frames.) What is asked of it first raises what became of this too:
        HostCannotTake, StorageError of a disk.
        """
        self._frame_order = None if builtin else seed
        arguments = {
            "nr_vcpus": nr_vcpus,
            "max_pages": max_pages,
            "target_pages": max_pages if target_pages is None else target_pages,
            "available_vcpus": None if available_vcpus is None else sorted(available_vcpus),
            "deterministic": deterministic,
            "builtin": builtin,
            "disks": list(disks),
            "disks_later": disks_later,
            "warm": warm,
            "frame_order": self._frame_order,
            "xen_frames": self.populate(XEN_FRAMES).tolist(),
            "journal": self.journal,
        }
        self._begin = self._conversation.ask("begin", b"", arguments)

    def wait_begun(self) -> None:
        """Raise what begin() came to, if nothing that was asked since has."""
        self._begun()

    def _begun(self) -> None:
        if self._begin:
            pending, self._begin = self._begin, None
            self._shared_info_mfn = pending.wait()[0]["shared_info_mfn"]

    @property
    def shared_info_mfn(self) -> int:
        """The frame of shared_info of a domain that is being built."""
        self._begun()
        return self._shared_info_mfn

    def abandon(self) -> None:
        """Give up a domain that was being built; waits until nothing of it is left.

        The copy of a migration that has begun to run goes on."""
        with contextlib.suppress(XsaveError):
            self._begun()
        with contextlib.suppress(XsaveError):
            self.give_up_copy()
        self.close()

    def give_up_copy(self) -> None:
        """End the domain unless it is a migration's copy that runs; waits until it has ended.

        Raises GuestStateError if it runs, StorageError if the journal cannot be written."""
        self._call("abandon", journal=self.journal)
        with contextlib.suppress(OSError, ConnectionLost):
            self._sock.settimeout(_ABANDON_TIMEOUT_S)
            receive_exact(self._sock, 1)  # its end closes the connection

    def populate(self, nr: int) -> np.ndarray:
        """Take fresh frames for the domain, all zero, shuffled: (nr,) u64. Raises OutOfFrames."""
        return self.machine.allocate(self.domid, nr, self._frame_order)

    def ask_set_vcpu(self, state: VcpuState) -> Callable[[], object]:
        """Raises HostCannotTake, when it is waited for."""
        blob = pack_blobs(state.context, state.extended, state.xsave, state.msrs)
        return self._post("setvcpu", blob, vcpu_id=state.vcpu_id).wait

    def ask_pin(
        self, mfns: np.ndarray, levels: np.ndarray, own: np.ndarray, ahead: np.ndarray
    ) -> Callable[[], object]:
        """Have page tables, of these levels, validated, and those that are the guest's own pins
        (n,) bool pinned. ahead: frames (m,) whose pins from before are undone then. Raises
        HostCannotTake naming the first page table of the guest's own that was refused, when it
        is waited for."""
        parts = mfns.astype("<u8"), levels.astype(np.uint8), own, ahead.astype("<u8")
        return self._post("pin", pack_blobs(*(part.tobytes() for part in parts))).wait

    def pin_l1s(self, mfns: np.ndarray) -> np.ndarray:
        """Pin those of these frames, all different, that are valid L1 tables now; return which,
        (n,) bool."""
        return np.frombuffer(self._call("pin_l1s", mfns.astype("<u8").tobytes())[1], bool)

    def touch(self, mfns: np.ndarray) -> None:
        """Have the domain's process touch these frames, which hold something: the first touch is
        what takes longest of a frame, and then whoever needs it does not wait for that."""
        self._call("touch", mfns.astype("<u8").tobytes())

    def ask_unpin(self, mfns: np.ndarray) -> Callable[[], object]:
        """Undo pins of a domain that is being built."""
        return self._post("unpin", mfns.astype("<u8").tobytes()).wait

    def ask_set_state(self, state: DomainState) -> Callable[[], object]:
        p2m = b"" if state.p2m_frames is None else state.p2m_frames.astype("<u8").tobytes()
        return self._post(
            "setstate",
            pack_blobs(state.config, state.cpuid_policy, state.msr_policy, p2m),
            tsc=state.tsc,
            p2m_size=state.p2m_size,
            xen_version=state.xen_version,
        ).wait

    def ask_connect_rings(self, store_mfn: int, console_mfn: int) -> Callable[[], tuple[int, int]]:
        """Attach xenstore and console to their ring pages; their event channels are waited for."""
        pending = self._post("rings", store_mfn=store_mfn, console_mfn=console_mfn)

        def wait() -> tuple[int, int]:
            message, _ = pending.wait()
            return message["store_port"], message["console_port"]

        return wait

    def build(
        self, kernel: str, ramdisk: str | None, cmdline: str, nr_pages: int | None = None
    ) -> None:
        """Have the domain builder fill the domain from a kernel file; it begins with nr_pages
        (all that it may have, if None)."""
        self._call("build", kernel=kernel, ramdisk=ramdisk, cmdline=cmdline, nr_pages=nr_pages)

    def fill(self) -> None:
        """Have the pages brought that are outstanding as they are touched, by whoever; the rest
        follows after commit(). Raises HostCannotTake. The domain was given the image, and the
        tables of what is outstanding, when its process was started."""
        self._call("fill")

    def wait_filled(self) -> None:
        """Wait until all pages that were outstanding are there. Raises StorageError if they will
        never be, or it cannot be written down that they are."""
        self._call("filled")

    def check_held(self) -> None:
        """Raise GuestStateError or ConnectionLost unless this migration holds the domain. What was
        read of its frames before is the suspended guest's."""
        self._call("held", journal=self.journal)

    def commit(self) -> None:
        """The domain is whole: it survives this connection, paused until unpaused. Raises
        GuestStateError if anything that was asked to make it failed."""
        self.ask_commit()()

    def ask_commit(self) -> Callable[[], object]:
        """commit(), asked ahead: perhaps before it is known whether all went well."""
        return self._post("commit").wait
