"""save: a suspended domain becomes an image, byte for byte as Xen's tools would write one.

    suspend -> static records -> per batch of 1024 pfns: p2m -> frames -> types -> canonicalise
    -> PAGE_DATA -> TSC, shared_info, vCPU contexts -> END -> commit -> only now the source ends

It reads the guest through domctl and changes nothing of it but the suspend. Whatever fails or
interrupts it, up to the commit, the guest goes on where it was. Mirrors
tools/libs/guest/xg_sr_save.c and xg_sr_save_x86_pv.c.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from xsave import p2m as guest_p2m
from xsave.behind import Behind
from xsave.canonical import canonical_p2m, canonicalise, mfns_to_pfns
from xsave.errors import GuestStateError, XsaveError
from xsave.frames import INVALID_P2M_ENTRY, PageType
from xsave.gathering import Gatherer, Patches
from xsave.guest.xen.domctl import DomainState, Domctl, VcpuState
from xsave.image import libxc
from xsave.image.buffers import Buffer, Write, nbytes
from xsave.image.stream import StreamEncoder
from xsave.progress import Finished, Pages, Report, Stage, ignore
from xsave.public import SharedInfo, StartInfo, VcpuGuestContext

#: Pages that wait to be written, or are being written, while the next ones are looked at.
_MAX_WAITING_BYTES = 16 << 20
GUEST_WIDTH, PT_LEVELS = 8, 4
_INVALID = np.uint64(INVALID_P2M_ENTRY)


@dataclass(frozen=True)
class SaveResult:
    """What a save did."""

    nr_pages: int
    zero_pages: int
    image_bytes: int
    seconds: float


def save(
    domctl: Domctl,
    write: Write,
    *,
    commit: Callable[[], None],
    leave: str = "destroyed",
    report: Report = ignore,
) -> SaveResult:
    """Suspend the guest, write its image, commit it, and then destroy or resume the guest.

    leave: "destroyed", "running" or "paused". write may keep no buffer after it returns.
    Raises SuspendFailed, GuestStateError, and what write and commit raise; the guest then runs on.
    """
    started = time.monotonic()
    report(Stage("save", "freeze", "asking the guest to suspend"))
    # Not ours to resume before it is ours: the lease may be another save's or migration's.
    domctl.suspend(lambda stage: report(Stage("save", "suspend", stage)))
    try:
        writer = Writer(domctl, write, report)
        writer.run()
        report(Stage("save", "sync"))
        commit()
    except BaseException:
        with suppress(XsaveError):  # its process is gone: what failed first is what is told
            domctl.resume()
        raise
    if leave == "destroyed":
        domctl.destroy()
    else:
        domctl.resume(paused=leave == "paused")
    result = SaveResult(
        writer.nr_pages, writer.zero_pages, writer.image_bytes, time.monotonic() - started
    )
    report(Finished("save", result.seconds, result.nr_pages, result.image_bytes))
    return result


class Writer:
    """Writes the image of one suspended domain."""

    def __init__(self, domctl: Domctl, write: Write, report: Report) -> None:
        self._domctl = domctl
        self._machine = domctl.machine
        self._sink = write
        self._report = report
        self.nr_pages = self.zero_pages = self.image_bytes = 0

    def _write(self, *buffers: Buffer) -> None:
        self._sink(buffers)
        self.image_bytes += sum(map(nbytes, buffers))

    def run(self) -> None:
        state = self._domctl.state()
        vcpus = self._domctl.vcpus()
        page = self._machine.pages[state.shared_info_mfn].tobytes()
        shared = SharedInfo.from_buffer_copy(page)
        found = guest_p2m.find(self._domctl, state, shared)
        self._p2m = found.p2m
        contexts = self._contexts(vcpus)
        start_info_pfn = contexts[0].user_regs.rdx
        self._write(StreamEncoder.headers("xl", state.config, state.xen_version))
        self._write_static(state, found.frames)
        self._report(Stage("save", "pages"))
        self._write_pages(found, start_info_pfn, state)
        self._report(Stage("save", "vcpus"))
        self._write_tail(state, page, shared, vcpus, contexts)
        self._write(StreamEncoder.trailer("xl"))

    def _record(self, value: object) -> None:
        self._write(StreamEncoder.record(value))

    def _write_static(self, state: DomainState, frames: np.ndarray) -> None:
        self._record(libxc.X86PvInfo(GUEST_WIDTH, PT_LEVELS))
        if state.cpuid_policy:
            self._record(libxc.X86CpuidPolicy(state.cpuid_policy))
        if state.msr_policy:
            self._record(libxc.X86MsrPolicy(state.msr_policy))
        self._record(libxc.StaticDataEnd())
        self._record(libxc.X86PvP2mFrames(0, self._p2m.size - 1, frames))

    # -- vCPUs and shared_info ---

    def _pfn(self, mfn: int, what: str) -> int:
        pfns, valid = mfns_to_pfns(np.array([mfn], np.uint64), self._machine.m2p, self._p2m)
        if not valid[0]:
            raise GuestStateError(f"{what} is in frame {mfn:#x}, which the guest has no pfn for")
        return int(pfns[0])

    def _contexts(self, vcpus: list[VcpuState]) -> list[VcpuGuestContext]:
        """Return the vCPUs' contexts with pfns where Xen keeps mfns."""
        contexts = []
        for vcpu in vcpus:
            context = VcpuGuestContext.from_buffer_copy(vcpu.context)
            name = f"vCPU {vcpu.vcpu_id}'s"
            registers = context.ctrlreg
            registers[3] = self._pfn(registers[3] >> 12, f"{name} cr3") << 12
            if registers[1]:
                # Bit 0 tells user page tables at pfn 0 from none.
                registers[1] = self._pfn(registers[1] >> 12, f"{name} cr1") << 12 | 1
            for i in range(-(-context.gdt_ents // 512)):
                context.gdt_frames[i] = self._pfn(context.gdt_frames[i], f"{name} GDT")
            if vcpu.vcpu_id == 0:
                context.user_regs.rdx = self._pfn(context.user_regs.rdx, "start_info")
                context.user_regs.rax = 0
            contexts.append(context)
        return contexts

    def _write_tail(
        self,
        state: DomainState,
        page: bytes,
        shared: SharedInfo,
        vcpus: list[VcpuState],
        contexts: list[VcpuGuestContext],
    ) -> None:
        self._record(libxc.X86TscInfo(*state.tsc))
        if not state.never_run and shared.arch.p2m_cr3:
            shared.arch.p2m_cr3 = self._pfn(shared.arch.p2m_cr3 >> 12, "the p2m's cr3") << 12
        normalise_shared_info(shared)
        self._record(libxc.SharedInfo(bytes(shared) + page[ctypes.sizeof(shared) :]))
        for vcpu, context in zip(vcpus, contexts, strict=True):
            self._record(libxc.X86PvVcpuBasic(vcpu.vcpu_id, bytes(context)))
            if vcpu.extended:
                self._record(libxc.X86PvVcpuExtended(vcpu.vcpu_id, vcpu.extended))
            if vcpu.xsave:
                self._record(libxc.X86PvVcpuXsave(vcpu.vcpu_id, vcpu.xsave))
            if vcpu.msrs:
                self._record(libxc.X86PvVcpuMsrs(vcpu.vcpu_id, vcpu.msrs))

    # -- pages ---

    def _write_pages(
        self, found: guest_p2m.GuestP2m, start_info_pfn: int, state: DomainState
    ) -> None:
        p2m = self._p2m
        backed = p2m != _INVALID
        types = np.full(p2m.size, PageType.XTAB, np.uint8)
        types[backed] = self._domctl.page_types(p2m[backed])
        known = self._patches(found, start_info_pfn, state)

        def patches(first: int, end: int) -> Patches:
            tables = self._canonical_tables(first, types[first:end])
            inside = known.within(first, end)
            return Patches.of(((inside.pfns, inside.pages), tables))

        gatherer = Gatherer(self._domctl, p2m, types, patches)
        with Behind(self._sink, _MAX_WAITING_BYTES) as write:
            for batch in gatherer:
                size = sum(map(nbytes, batch.buffers))
                write(size, batch.buffers)
                self.nr_pages += batch.nr_pages
                self.zero_pages += batch.zero_pages
                self.image_bytes += size
                done = batch.end_pfn
                self._report(Pages("save", done, p2m.size, self.image_bytes, self.zero_pages))

    def _patches(
        self, found: guest_p2m.GuestP2m, start_info_pfn: int, state: DomainState
    ) -> Patches:
        """Return the pages that Xen's numbers or the host's are in, as an image holds them, but
        for the page tables."""
        mem, p2m = self._machine.mem, self._p2m
        pfns, valid = mfns_to_pfns(mem[p2m[found.list_frames]], self._machine.m2p, p2m)
        lists = np.where(valid, pfns, np.uint64(0))
        start_info = self._start_info(start_info_pfn, state)
        return Patches.of(
            (
                (found.frames, canonical_p2m(p2m)),
                (found.list_frames, lists),
                (np.array([start_info_pfn]), start_info.reshape(1, -1)),
            )
        )

    def _canonical_tables(self, first: int, types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (pfns, pages) of the page tables among the pfns from first on of these types."""
        mem, p2m = self._machine.mem, self._p2m
        levels = np.where(types < PageType.BROKEN, types & 7, 0)
        tables = np.flatnonzero(levels)
        levels, tables = levels[tables], first + tables
        result = canonicalise(mem[p2m[tables]], levels, self._machine.m2p, p2m)
        if result.bad.size:
            row, slot = result.bad[0]
            entry = int(mem[p2m[tables[row]], slot])
            raise GuestStateError(
                f"the level-{levels[row]} page table at pfn {tables[row]:#x} names a "
                f"frame that is not the guest's: entry {slot} is {entry:#x}"
            )
        return tables, result.tables

    def _start_info(self, pfn: int, state: DomainState) -> np.ndarray:
        """The page as a restore leaves it, but for what the new host fills in: zeros there."""
        page = self._machine.pages[self._p2m[pfn]].tobytes()
        info = StartInfo.from_buffer_copy(page)
        if state.never_run:
            # The guest makes pfns of these two before it suspends; this one never ran.
            info.store_mfn = self._pfn(info.store_mfn, "the xenstore ring")
            info.console_mfn = self._pfn(info.console_mfn, "the console ring")
        info.nr_pages = self._p2m.size
        info.shared_info = info.flags = info.store_evtchn = info.console_evtchn = 0
        return np.frombuffer(bytes(info) + page[ctypes.sizeof(info) :], np.uint64)


def normalise_shared_info(shared: SharedInfo) -> None:
    """Give every field that a restore overwrites the value the restore gives it (libxc's
    handle_shared_info), so that the image holds no mfn and a second save is the same."""
    shared.arch.pfn_to_mfn_frame_list_list = 0
    ctypes.memset(shared.evtchn_pending, 0, ctypes.sizeof(shared.evtchn_pending))
    ctypes.memset(shared.evtchn_mask, 0xFF, ctypes.sizeof(shared.evtchn_mask))
    for info in shared.vcpu_info:
        info.evtchn_pending_sel = 0
        info.evtchn_upcall_mask = 1
