"""save: a suspended domain becomes an image, byte for byte as Xen's tools would write one.

    suspend -> static records -> per batch of 1024 pfns: p2m -> frames -> types -> canonicalise
    -> PAGE_DATA -> TSC, shared_info, vCPU contexts -> END -> commit -> only now the source ends

It reads the guest through domctl and changes nothing of it but the suspend. Whatever fails or
interrupts it, up to the commit, the guest goes on where it was. Mirrors
tools/libs/guest/xg_sr_save.c and xg_sr_save_x86_pv.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
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
from xsave.view import page_types

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
        with contextlib.suppress(
            XsaveError
        ):  # its process is gone: what failed first is what is told
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


@dataclass(frozen=True)
class Seen:
    """A domain as it was at one moment: its state, shared_info as bytes and as fields, its p2m."""

    state: DomainState
    page: bytes
    shared: SharedInfo
    found: guest_p2m.GuestP2m


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
        """Write all of it."""
        seen, vcpus = self._look(), self._domctl.vcpus()
        contexts = self._contexts(vcpus)
        self._write_head(seen)
        self._report(Stage("save", "pages"))
        self._write_pages(seen, contexts[0].user_regs.rdx)
        self._report(Stage("save", "vcpus"))
        self._write_tail(seen, vcpus, contexts)

    def _shared_info(self, state: DomainState) -> tuple[bytes, SharedInfo]:
        page = self._machine.pages[state.shared_info_mfn].tobytes()
        return page, SharedInfo.from_buffer_copy(page)

    def _look(self) -> Seen:
        """Look at the domain as it is now; from here on its p2m is the one found."""
        state = self._domctl.state()
        page, shared = self._shared_info(state)
        found = guest_p2m.find(self._domctl, state, shared)
        self._p2m = found.p2m
        return Seen(state, page, shared, found)

    def _write_head(self, seen: Seen) -> None:
        self._write(StreamEncoder.headers("xl", seen.state.config, seen.state.xen_version))
        self._write_static(seen.state, seen.found.frames)

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
        self, seen: Seen, vcpus: list[VcpuState], contexts: list[VcpuGuestContext]
    ) -> None:
        """At once: each write wakes whoever reads."""
        state, page, shared = seen.state, seen.page, seen.shared
        tail: list[object] = [libxc.X86TscInfo(*state.tsc)]
        if not state.never_run and shared.arch.p2m_cr3:
            shared.arch.p2m_cr3 = self._pfn(shared.arch.p2m_cr3 >> 12, "the p2m's cr3") << 12
        normalise_shared_info(shared)
        tail.append(libxc.SharedInfo(bytes(shared) + page[ctypes.sizeof(shared) :]))
        for vcpu, context in zip(vcpus, contexts, strict=True):
            tail.append(libxc.X86PvVcpuBasic(vcpu.vcpu_id, bytes(context)))
            if vcpu.extended:
                tail.append(libxc.X86PvVcpuExtended(vcpu.vcpu_id, vcpu.extended))
            if vcpu.xsave:
                tail.append(libxc.X86PvVcpuXsave(vcpu.vcpu_id, vcpu.xsave))
            if vcpu.msrs:
                tail.append(libxc.X86PvVcpuMsrs(vcpu.vcpu_id, vcpu.msrs))
        self._write(*map(StreamEncoder.record, tail), StreamEncoder.trailer("xl"))

    # -- pages ---

    def _write_pages(self, seen: Seen, start_info_pfn: int) -> None:
        types = page_types(self._domctl, self._p2m)
        start_info = self._start_info(start_info_pfn, seen.state).reshape(1, -1)
        known = Patches.of(
            (*self._p2m_patches(seen.found), (np.array([start_info_pfn]), start_info))
        )

        def patches(pfns: np.ndarray) -> Patches:
            tables = self._canonical_tables(pfns, types)
            inside = known.among(pfns)
            return Patches.of(((inside.pfns, inside.pages), tables))

        self._send(Gatherer(self._domctl, self._p2m, types, patches))

    def _send(self, gatherer: Gatherer, *, few: bool = False) -> None:
        """Write all of it; few: it is not worth a thread."""
        with contextlib.nullcontext() if few else Behind(self._sink, _MAX_WAITING_BYTES) as behind:
            for batch in gatherer:
                size = sum(map(nbytes, batch.buffers))
                if behind is None:
                    self._sink(batch.buffers)
                else:
                    behind(size, batch.buffers)
                self.nr_pages += batch.nr_pages
                self.zero_pages += batch.zero_pages
                self.image_bytes += size
                done, total = batch.end_pfn, self._p2m.size
                self._report(Pages("save", done, total, self.image_bytes, self.zero_pages))

    def _p2m_patches(self, found: guest_p2m.GuestP2m) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the p2m's pages, and those of its frame lists, as an image holds them."""
        lists = (found.list_frames, self._frame_lists(found.list_frames))
        return [(found.frames, canonical_p2m(self._p2m)), lists]

    def _frame_lists(self, pfns: np.ndarray) -> np.ndarray:
        """Return these pages of frame lists as an image holds them."""
        mem, p2m = self._machine.mem, self._p2m
        named, valid = mfns_to_pfns(mem[p2m[pfns]], self._machine.m2p, p2m)
        return np.where(valid, named, np.uint64(0))

    def _table_pages(self, pfns: np.ndarray) -> np.ndarray:
        return np.asarray(self._machine.mem[self._p2m[pfns]])

    def _canonical_tables(
        self, pfns: np.ndarray, types: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (pfns, pages) of the page tables among these pfns; types are those of all."""
        levels = np.where(types[pfns] < PageType.BROKEN, types[pfns] & 7, 0)
        tables = pfns[levels != 0]
        levels = levels[levels != 0]
        result = canonicalise(self._table_pages(tables), levels, self._machine.m2p, self._p2m)
        if result.bad.size:
            row, slot = result.bad[0]
            entry = int(self._table_pages(tables[row : row + 1])[0, slot])
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
