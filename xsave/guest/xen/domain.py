"""A domain: its frames, vCPUs, event channels, clock, console and xenstore, put together.

Nothing here is the guest's state: that is in frames and in the vCPUs' contexts. Every domain has
a few frames of Xen's own: shared_info (the one the guest may map), the page tables that put its
GDTs and LDTs at XEN_PERDOMAIN (slot 257), a page of reserved descriptors, a zero page and a scratch
page.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from xsave.errors import HostCannotTake
from xsave.frames import (
    PAGE_SHIFT,
    PTE_ACCESSED,
    PTE_DIRTY,
    PTE_PRESENT,
    PTE_RW,
    PTE_USER,
)
from xsave.guest.xen.console import Console
from xsave.guest.xen.context import Vcpu
from xsave.guest.xen.cpuid import CpuPolicy
from xsave.guest.xen.events import EventChannels, Port
from xsave.guest.xen.grants import GrantTable
from xsave.guest.xen.ldt import Ldts
from xsave.guest.xen.machine import M2P_L3_FRAME, XEN_FRAMES, Machine
from xsave.guest.xen.pagetable import PageTables
from xsave.guest.xen.pagetypes import PGT_SEG_DESC, PGT_WRITABLE, PGT_XEN
from xsave.guest.xen.time import RealClock, scale
from xsave.guest.xen.xenstore import Connection, XenStore, service_ring
from xsave.public import SHUTDOWN_CRASH, SharedInfo, VcpuInfo

PERDOMAIN_VA = 0xFFFF_8080_0000_0000  # slot 257
GDT_STRIDE = 0x10000
_LDT_SLOT, _LDT_AREA = 1, PERDOMAIN_VA + (1 << 21)  # behind all GDTs
RESERVED_GDT_PAGE = 14
HYPERVISOR_VIRT_START = 0xFFFF_8000_0000_0000
# Supervisor only: the emulator reads descriptors as the CPU does, the guest must not write them.
_XEN_PTE = PTE_PRESENT | PTE_RW | PTE_ACCESSED | PTE_DIRTY
# FLAT_RING1_CS32..FLAT_RING3_CS64 of xen/include/public/arch-x86/xen-x86_64.h
RESERVED_DESCRIPTORS = {
    0xE019 >> 3: 0x00CFFB000000FFFF,
    0xE023 >> 3: 0x00CFFB000000FFFF,
    0xE02B >> 3: 0x00CFF3000000FFFF,
    0xE033 >> 3: 0x00AFFB000000FFFF,
}


class Domain:
    """One guest's share of a machine, as its domain process holds it."""

    def __init__(
        self,
        machine: Machine,
        domid: int,
        *,
        nr_vcpus: int,
        max_pages: int,
        clock: RealClock,
        log_path: Path,
        xen_frames: Sequence[int] | None = None,
        frame_order: int | None = None,
    ) -> None:
        """xen_frames: XEN_FRAMES fresh frames of the domain's; None: take them here. frame_order:
        of Machine.allocate."""
        self.machine = machine
        self.max_pages = max_pages
        self.domid = domid
        self.frame_order = frame_order
        self.clock = clock
        self.policy = CpuPolicy.default()
        self.vm_assist = 0
        self.tsc = {"mode": 0, "incarnation": 0}
        self.shutdown_reason: int | None = None
        self.crash_message = ""
        self.never_run = True
        #: Called with frames (n,) that are to be freed.
        self.before_free: Callable[[np.ndarray], None] = lambda mfns: None
        self._use_xen_frames(xen_frames or self.allocate(XEN_FRAMES).tolist())
        self.tables = PageTables(machine, domid, self._xen_l4_slots())
        self._hold_writable(self.shared_info_mfn)
        self.vcpus = [Vcpu(i, self.shared.vcpu_info[i]) for i in range(nr_vcpus)]
        self.events = EventChannels(self.tables, self.vcpus, self.shared)
        self.grants = GrantTable(machine, self.tables, self.allocate)
        self._build_perdomain()
        self.console = Console(log_path)
        self.console_port = 0
        self.store = XenStore()
        self.home = f"/local/domain/{domid}"
        self.store_page: memoryview | None = None
        self.store_port = 0
        self.connection = Connection(self.store, domid, home=self.home)

    def allocate(self, nr: int) -> np.ndarray:
        """Take nr more frames, all zero, shuffled: (nr,) u64. Raises OutOfFrames."""
        return self.machine.allocate(self.domid, nr, self.frame_order)

    # -- Xen's own frames ---

    def _use_xen_frames(self, mfns: Sequence[int]) -> None:
        self.shared_info_mfn, self._l3, self._l2, self._l1 = mfns[:4]
        self._reserved_gdt, self._zero, self.scratch_mfn, self._ldt_l1 = mfns[4:]
        self.machine.page_type[list(mfns[1:])] = PGT_XEN
        self.shared = SharedInfo.from_buffer(self.machine.map, self.shared_info_mfn << PAGE_SHIFT)
        for info in self.shared.vcpu_info:
            info.evtchn_upcall_mask = 1
        ctypes.memset(self.shared.evtchn_mask, 0xFF, ctypes.sizeof(self.shared.evtchn_mask))

    def _xen_l4_slots(self) -> dict[int, int]:
        readonly = PTE_PRESENT | PTE_USER | PTE_ACCESSED
        return {
            256: (M2P_L3_FRAME << PAGE_SHIFT) | readonly,
            257: (self._l3 << PAGE_SHIFT) | _XEN_PTE,
        }

    def _build_perdomain(self) -> None:
        mem = self.machine.mem
        mem[self._l3, 0] = (self._l2 << PAGE_SHIFT) | _XEN_PTE
        mem[self._l2, 0] = (self._l1 << PAGE_SHIFT) | _XEN_PTE
        mem[self._l2, _LDT_SLOT] = (self._ldt_l1 << PAGE_SHIFT) | _XEN_PTE
        self.ldts = Ldts(self.tables, self._ldt_l1, _LDT_AREA)
        for selector_index, descriptor in RESERVED_DESCRIPTORS.items():
            mem[self._reserved_gdt, selector_index - RESERVED_GDT_PAGE * 512] = descriptor
        for vcpu in self.vcpus:
            self._map_gdt(vcpu, [])

    def gdt_base(self, vcpu: Vcpu) -> int:
        return PERDOMAIN_VA + vcpu.id * GDT_STRIDE

    def _map_gdt(self, vcpu: Vcpu, frames: list[int]) -> None:
        """Map a vCPU's descriptor frames at its GDT base, zeros elsewhere."""
        row = self.machine.mem[self._l1]
        for i in range(16):
            mfn = frames[i] if i < len(frames) else self._zero
            if i == RESERVED_GDT_PAGE:
                mfn = self._reserved_gdt
            row[vcpu.id * 16 + i] = (mfn << PAGE_SHIFT) | _XEN_PTE

    def set_gdt(self, vcpu: Vcpu, frames: list[int], entries: int) -> int:
        """HYPERVISOR_set_gdt: take the frames as segment-descriptor pages. 0 or -errno."""
        taken: list[int] = []
        for mfn in frames:
            rc = self.tables.get_type(mfn, PGT_SEG_DESC)
            if rc:
                for other in taken:
                    self.tables.put_type(other)
                return rc
            taken.append(mfn)
        context = vcpu.context
        for i in range(-(-context.gdt_ents // 512)):
            self.tables.put_type(context.gdt_frames[i])
        for i in range(16):
            context.gdt_frames[i] = frames[i] if i < len(frames) else 0
        context.gdt_ents = entries
        self._map_gdt(vcpu, frames)
        self.tables.stale_tlb = True
        return 0

    @property
    def nr_xen_frames(self) -> int:
        """Of its frames, Xen's own."""
        return XEN_FRAMES + len(self.grants.frames)

    def nr_pages(self) -> int:
        """Frames the guest owns, Xen's own not counted."""
        return int(np.count_nonzero(self.machine.owner == self.domid)) - self.nr_xen_frames

    def start(self) -> None:
        """The first unpause: the clocks of this host begin, the restored state ends."""
        self.never_run = False
        self.clock.start()
        self.tsc["incarnation"] += 1
        self.update_wallclock()
        for vcpu in self.vcpus:
            self.update_time(vcpu)

    # -- time ---

    def update_time(self, vcpu: Vcpu) -> None:
        """Publish the clock in a vCPU's time info: tsc and system_time of the same instant."""
        now = self.clock.now()
        info = vcpu.info.time
        info.version = (info.version + 1) & 0xFFFFFFFF | 1
        info.tsc_timestamp = now * self.clock.khz // 1_000_000
        info.system_time = now
        info.tsc_to_system_mul, info.tsc_shift = scale(self.clock.khz)
        info.version = (info.version + 1) & 0xFFFFFFFE

    def update_wallclock(self) -> None:
        sec, nsec = divmod(self.clock.wallclock_ns(), 1_000_000_000)
        shared = self.shared
        shared.wc_version = (shared.wc_version + 1) | 1
        shared.wc_sec, shared.wc_sec_hi, shared.wc_nsec = sec & 0xFFFFFFFF, sec >> 32, nsec
        shared.wc_version = (shared.wc_version + 1) & 0xFFFFFFFE

    def wakes(self, vcpu: Vcpu) -> bool:
        """True if a blocked vCPU may run: an upcall, a polled port, a poll's end."""
        if vcpu.info.evtchn_upcall_pending and not vcpu.info.evtchn_upcall_mask:
            return True
        if any(self.events.is_pending(port) for port in vcpu.polling):
            return True
        return vcpu.poll_deadline_ns is not None and vcpu.poll_deadline_ns <= self.clock.now()

    def run_timers(self, now: int) -> None:
        """Raise VIRQ_TIMER on every vCPU whose deadline has come."""
        for vcpu in self.vcpus:
            if vcpu.timer_ns is not None and vcpu.timer_ns <= now:
                vcpu.timer_ns = None
                self.events.raise_virq(0, vcpu.id)

    # -- the two rings ---

    def _hold_writable(self, mfn: int) -> None:
        """Xen writes to this frame for ever: it may become no page table and not be given back."""
        if rc := self.tables.get_type(mfn, PGT_WRITABLE):
            raise HostCannotTake(f"frame {mfn:#x} cannot be shared with Xen ({rc})")

    def connect_console(self, mfn: int) -> int:
        """Attach the console ring; return the port. Raises HostCannotTake."""
        self._hold_writable(mfn)
        self.console.page = self._page(mfn)
        self.console_port = self.events.bind(Port("interdomain", notify=self.serve_console))
        return self.console_port

    def connect_store(self, mfn: int) -> int:
        """Attach the xenstore ring; return the port. Raises HostCannotTake."""
        self._hold_writable(mfn)
        self.store_page = self._page(mfn)
        self.store_port = self.events.bind(Port("interdomain", notify=self.serve_store))
        return self.store_port

    def _page(self, mfn: int) -> memoryview:
        return memoryview(self.machine.map)[mfn << PAGE_SHIFT : (mfn + 1) << PAGE_SHIFT]

    def serve_console(self) -> None:
        if self.console.drain():
            self.events.set_pending(self.console_port)

    def serve_store(self) -> None:
        """Answer the requests in the ring and send what watches fired."""
        if self.store_page is not None and service_ring(self.store_page, self.connection):
            self.events.set_pending(self.store_port)

    # -- the end ---

    def crash(self, message: str) -> None:
        """domain_crash(): the guest did what no guest may."""
        if self.shutdown_reason is None:
            self.shutdown_reason = SHUTDOWN_CRASH
            self.crash_message = message
            self.console.put(f"(xsave) domain {self.domid} crashed: {message}\n".encode())

    def vcpu_info_at(self, address: int) -> VcpuInfo:
        return VcpuInfo.from_buffer(self.machine.map, address)

    def owns(self, mfn: int) -> bool:
        return self.tables.owned(mfn)
