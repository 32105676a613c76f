"""Requests that make a domain and read its state: the toolstack's half of create and restore.

The connection that sends `begin` holds the lease on the half-built domain until `commit`.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from xsave.errors import GuestStateError, HostCannotTake, StorageError
from xsave.frames import PAGE_SIZE
from xsave.guest.xen import elf, vextrap
from xsave.guest.xen.adopt import adopt_context
from xsave.guest.xen.builder import build
from xsave.guest.xen.context import xsave_fault
from xsave.guest.xen.cpuid import XEN_VERSION, CpuPolicy
from xsave.guest.xen.domain import Domain
from xsave.guest.xen.hypercalls import table
from xsave.guest.xen.hypervisor import Hypervisor
from xsave.guest.xen.pins import Pins
from xsave.guest.xen.time import RealClock, VirtualClock
from xsave.guest.xen.wire import pack_blobs, unpack_blobs
from xsave.host import bootconfig
from xsave.host.control import Client, Request
from xsave.host.disk.disks import Disks
from xsave.host.disk.spec import from_json
from xsave.host.registry import write_record
from xsave.host.running import RunningDomain
from xsave.host.unpacking import read_file, unpack
from xsave.public import XEN_LEGACY_MAX_VCPUS

Answer = tuple[dict[str, Any], bytes]


class Building:
    """What the toolstack has told of the domain: kept for the next save."""

    def __init__(self, running: RunningDomain) -> None:
        self._running = running
        self.builder: Client | None = None
        self.committed = False
        #: What a request of who builds it failed with, if one has.
        self.failure = ""
        self.restored = False
        self._config = b""
        self._p2m_frames = b""
        self._p2m_size = 0
        self._xen_version = list(XEN_VERSION)

    def _unbuilt(self) -> Domain:
        """The domain, while it may still be built."""
        if self.committed:
            raise GuestStateError("the domain is not being built any more")
        return self._running.domain

    def op_begin(self, request: Request) -> Answer:
        arguments, running = request.arguments, self._running
        if running.hypervisor is not None:
            raise GuestStateError("the domain exists already")
        nr_vcpus = int(arguments["nr_vcpus"])
        if not 1 <= nr_vcpus <= XEN_LEGACY_MAX_VCPUS:
            raise HostCannotTake(f"{nr_vcpus} vCPUs: expected 1 to {XEN_LEGACY_MAX_VCPUS}")
        self.builder = request.client
        running.builtin = bool(arguments.get("builtin"))
        specs = from_json(arguments.get("disks", []))
        running.disks = Disks(specs, running.disk_done, running.have)
        if arguments.get("disks_later"):
            running.disks.check()
        else:
            running.disks.open()
        domain = self._begin(
            nr_vcpus,
            int(arguments["max_pages"]),
            VirtualClock() if arguments.get("deterministic") else RealClock(),
            arguments.get("xen_frames"),
            arguments.get("frame_order"),
        )
        available = arguments.get("available_vcpus")
        self._fill_store(domain, int(arguments["target_pages"]), available)
        if arguments.get("warm"):
            running.warm_up()
            if not running.builtin:
                vextrap.prepare()
        return {"shared_info_mfn": domain.shared_info_mfn}, b""

    def _begin(
        self,
        nr_vcpus: int,
        max_pages: int,
        clock: RealClock,
        xen_frames: list[int] | None,
        frame_order: int | None,
    ) -> Domain:
        """Put a domain with nothing in it in the place of the one that was, if any."""
        running = self._running
        domain = Domain(
            running.machine,
            running.domid,
            nr_vcpus=nr_vcpus,
            max_pages=max_pages,
            clock=clock,
            log_path=running.directory / "console.log",
            xen_frames=xen_frames,
            frame_order=frame_order,
        )
        domain.console.listeners.append(running.control.console_output)
        domain.console.holds_input = clock.virtual
        domain.console.on_room = running.control.resume_input
        running.hypervisor = Hypervisor(domain, table())
        running.forget_cpu()
        return domain

    def _fill_store(
        self, domain: Domain, target_pages: int, available_vcpus: Sequence[int] | None
    ) -> None:
        """The nodes a PV guest expects, as libxl writes them.

        A balloon driver follows memory/target, and a kernel the availability of its vCPUs, at
        once when it resumes. available_vcpus None: all.
        """
        domain.store.introduce(domain.domid)
        online = range(len(domain.vcpus)) if available_vcpus is None else available_vcpus
        nodes = {
            "name": self._running.name,
            "domid": str(domain.domid),
            **{
                f"cpu/{vcpu.id}/availability": availability(vcpu.id in online)
                for vcpu in domain.vcpus
            },
            "memory/static-max": str(domain.max_pages * 4),
            "memory/target": str(target_pages * 4),
            "device": "",
            "control/shutdown": "",
            "control/platform-feature-multiprocessor-suspend": "1",
            "control/platform-feature-xs_reset_watches": "1",
            "console/type": "xenconsoled",
        }
        for node, value in nodes.items():
            domain.store.write(f"{domain.home}/{node}", value)
        self._running.disks.plug(domain, self._running.forget_code)

    def op_build(self, request: Request) -> Answer:
        domain, arguments = self._unbuilt(), request.arguments
        nr_pages = int(arguments.get("nr_pages") or domain.max_pages)
        self._boot(arguments["kernel"], arguments.get("ramdisk"), arguments["cmdline"], nr_pages)
        return {}, b""

    def _boot(self, path: str, ramdisk: str | None, cmdline: str, nr_pages: int) -> None:
        """Load a kernel into the empty domain."""
        kernel = elf.parse(self._unpacked(path), path)
        initrd = read_file(ramdisk) if ramdisk else b""
        build(self._running.domain, kernel, initrd, cmdline, nr_pages)
        self._p2m_size = nr_pages

    def _unpacked(self, path: str) -> bytes | memoryview:
        """The kernel in a file: it was read when the process began, if that was told of it."""
        begun, self._running.unpacking = self._running.unpacking, None
        return begun.result() if begun and begun.path == path else unpack(path)

    def restart(self) -> None:
        """Begin again from the kernel, as the configuration says: same domid, name, clock and
        connections, fresh frames. Raises XsaveError; the domain is then not to be used."""
        boot = bootconfig.read(self._config)
        running, old = self._running, self._running.domain
        running.disks.unplug()
        running.end_filling()
        running.machine.free_domain(running.domid)
        running.builtin = boot.builtin
        max_pages = boot.max_memory_bytes // PAGE_SIZE
        domain = self._begin(boot.vcpus, max_pages, old.clock, None, old.frame_order)
        old.console.close()
        domain.tsc = old.tsc
        nr_pages = boot.memory_bytes // PAGE_SIZE
        self._fill_store(domain, nr_pages, boot.available_vcpus)
        self._boot(boot.kernel_path, boot.ramdisk, boot.cmdline, nr_pages)
        self._p2m_frames, self.restored = b"", False
        del old
        gc.collect()  # the emulator of before, with its translations, is in cycles

    def action_on(self, event: str) -> str:
        """What is to happen when the guest ends with this event."""
        return bootconfig.action_on(self._config, event)

    def op_setvcpu(self, request: Request) -> Answer:
        """XEN_DOMCTL_setvcpucontext: cr3, cr1 and gdt_frames are mfns and are validated here."""
        domain = self._unbuilt()
        context, extended, xsave, msrs = unpack_blobs(request.blob, 4)
        vcpu_id = int(request.arguments["vcpu_id"])
        if vcpu_id >= len(domain.vcpus):
            raise HostCannotTake(f"vCPU {vcpu_id} of a domain with {len(domain.vcpus)}")
        vcpu = domain.vcpus[vcpu_id]
        if fault := xsave_fault(xsave):
            raise HostCannotTake(f"vCPU {vcpu.id}'s XSAVE state: {fault}", part="xsave")
        if wrong := adopt_context(domain, vcpu, context):
            raise HostCannotTake(wrong)
        vcpu.initialised = vcpu.online = True
        if extended:
            vcpu.extended = type(vcpu.extended).from_buffer_copy(
                extended.ljust(len(bytes(vcpu.extended)), b"\0")
            )
        vcpu.xsave, vcpu.msrs = xsave, msrs
        domain.vm_assist = vcpu.context.vm_assist
        return {}, b""

    def op_pin(self, request: Request) -> Answer:
        """The guest's own pins. A table that is pinned beside them may be odd, and in the way."""
        tables, pins = self._unbuilt().tables, Pins(self._unbuilt().tables)
        mfns_raw, levels_raw, own_raw, ahead_raw = unpack_blobs(request.blob, 4)
        mfns, levels = np.frombuffer(mfns_raw, np.uint64), np.frombuffer(levels_raw, np.uint8)
        own = np.frombuffer(own_raw, bool)
        pinned = pins.pin_levels(mfns, levels)
        others = np.concatenate((mfns[pinned & ~own], np.frombuffer(ahead_raw, np.uint64)))
        rest = own & ~pinned
        for mfn, level in zip(mfns[rest].tolist(), levels[rest].tolist(), strict=True):
            rc = tables.pin(mfn, level)
            if rc and others.size:
                self._unpin(others)
                others = others[:0]
                rc = tables.pin(mfn, level)
            if rc:
                raise self._no_table(mfn, level, rc)
        self._unpin(others)
        return {}, b""

    def _no_table(self, mfn: int, level: int, rc: int) -> HostCannotTake:
        domain = self._running.domain
        pfn = int(domain.machine.m2p[mfn]) if domain.tables.owned(mfn) else mfn
        what = f"the page table at pfn {pfn:#x} is no valid table of level {level} ({rc})"
        return HostCannotTake(what, pfn=pfn)

    def op_pin_l1s(self, request: Request) -> Answer:
        """Those that cannot be pinned, or not yet, are nobody's fault."""
        mfns = np.frombuffer(request.blob, np.uint64)
        return {}, Pins(self._unbuilt().tables).pin_l1s(mfns).tobytes()

    def op_touch(self, request: Request) -> Answer:
        machine = self._unbuilt().machine
        mfns = np.frombuffer(request.blob, np.uint64)
        mfns = mfns[mfns < machine.nr_frames].astype(np.int64)
        machine.mem[mfns[machine.owner[mfns] == self._running.domid], 0].any()
        return {}, b""

    def op_unpin(self, request: Request) -> Answer:
        self._unpin(np.frombuffer(request.blob, np.uint64))
        return {}, b""

    def _unpin(self, mfns: np.ndarray) -> None:
        tables = self._unbuilt().tables
        for mfn in Pins(tables).unpin_used(mfns).tolist():
            if rc := tables.unpin(mfn):
                raise HostCannotTake(f"frame {mfn:#x} is no pinned page table ({rc})")

    def op_setstate(self, request: Request) -> Answer:
        domain, arguments = self._unbuilt(), request.arguments
        config, cpuid, msrs, p2m = unpack_blobs(request.blob, 4)
        self._config = config
        domain.policy = CpuPolicy(cpuid, msrs) if cpuid else CpuPolicy.of_emulator()
        mode, khz, nsec, incarnation = arguments["tsc"]
        clock = type(domain.clock)(origin_ns=nsec, khz=khz or domain.clock.khz)
        domain.clock = clock
        domain.tsc = {"mode": mode, "incarnation": incarnation}
        self._p2m_frames, self._p2m_size = p2m, arguments["p2m_size"]
        self._xen_version = arguments["xen_version"]
        self.restored = bool(p2m)
        return {}, b""

    def op_rings(self, request: Request) -> Answer:
        domain = self._unbuilt()
        store, console = request.arguments["store_mfn"], request.arguments["console_mfn"]
        for name, mfn in (("xenstore", store), ("console", console)):
            if not domain.tables.owned(mfn):
                raise HostCannotTake(f"the {name} ring lies outside the domain")
        return {
            "store_port": domain.connect_store(store),
            "console_port": domain.connect_console(console),
        }, b""

    def op_fill(self, _request: Request) -> Answer:
        """Lazy restore, post-copy: from here on pages are brought as they are touched."""
        domain, filling = self._unbuilt(), self._running.filling
        filling.start()
        domain.before_free = filling.settle
        return {}, b""

    def op_commit(self, _request: Request) -> Answer:
        self._unbuilt()
        if self.failure:
            raise GuestStateError(f"the domain is not whole: {self.failure}")
        if self._running.filling.lost:
            raise StorageError(f"the guest's memory cannot be read: {self._running.filling.lost}")
        self.committed = True
        if not self._running.filling.from_source:  # else when it becomes the guest
            self._running.filling.go()
        write_record(self._running.directory, name=self._running.name)
        return {}, b""

    def set_target(self, nr_pages: int) -> None:
        """What a restored guest will be told to have: the image's configuration says it."""
        self._note("target_memkb", nr_pages * 4)

    def set_available_vcpus(self, number: int) -> None:
        """Which vCPUs a restored guest will be told to use."""
        self._note("avail_vcpus", list(range(number)))

    def _note(self, key: str, value: Any) -> None:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            config = json.loads(self._config)
            config["b_info"][key] = value
            self._config = json.dumps(config, indent=4).encode() + b"\n"

    # -- for a save ---

    def op_getstate(self, _request: Request) -> Answer:
        domain = self._running.domain
        clock = domain.clock
        tsc = [domain.tsc["mode"], clock.khz, clock.now(), domain.tsc["incarnation"]]
        blob = pack_blobs(
            self._config,
            domain.policy.cpuid,
            domain.policy.msrs,
            self._p2m_frames if domain.never_run else b"",
        )
        return {
            "never_run": domain.never_run,
            "nr_vcpus": len(domain.vcpus),
            "max_pages": domain.max_pages,
            "shared_info_mfn": domain.shared_info_mfn,
            "tsc": tsc,
            "p2m_size": self._p2m_size,
            "xen_version": self._xen_version,
        }, blob

    def op_getvcpus(self, _request: Request) -> Answer:
        domain = self._running.domain
        self._running.xen.read_registers()
        ids, blobs = [], []
        for vcpu in domain.vcpus:
            if not vcpu.online:
                continue
            vcpu.context.vm_assist = domain.vm_assist
            ids.append(vcpu.id)
            blobs += [bytes(vcpu.context), bytes(vcpu.extended), vcpu.xsave, vcpu.msrs]
        return {"ids": ids}, pack_blobs(*blobs)


def availability(online: bool) -> str:
    """What cpu/N/availability says."""
    return "online" if online else "offline"
