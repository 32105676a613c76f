"""The end of a restore: from pages in frames to a domain that can run.

As libxc does it (xg_sr_restore_x86_pv.c stream_complete): page tables, vCPU contexts with cr3 and
start_info, pins, the p2m; plus the checks that make a wrong image an error instead of a dead
guest. The tables are pinned first: other pages may still be on their way into their frames then.
Errors name the record's offset where one is to blame, else the pfn.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import numpy as np

from xsave.canonical import local_p2m
from xsave.errors import HostCannotTake, ImageError
from xsave.frames import INVALID_P2M_ENTRY, PAGE_SHIFT, PAGE_SIZE, PageType
from xsave.guest.xen.domctl import DomainState, Domctl, VcpuState
from xsave.image import libxc
from xsave.image.pages import PageBatch
from xsave.image.stream import Item
from xsave.localising import Localiser
from xsave.parts import Parts
from xsave.placing import NO_PFNS, Memory
from xsave.public import SharedInfo, StartInfo, VcpuGuestContext

_INVALID = np.uint64(INVALID_P2M_ENTRY)
_MAX_GDT_ENTRIES = 14 * 512
_NO_ROWS = np.empty(0, np.int64)
#: Pages of the p2m that are written ahead at once.
_P2M_BATCH = 256
#: Windows of frames that are touched ahead at once: a millisecond's work or two.
_TOUCH_BATCH = 64
_KERNEL_MODE = 1 << 2


class Settler:
    """Works on one domain's Memory and the Parts of its image. Its methods raise ImageError,
    HostCannotTake."""

    def __init__(self, domctl: Domctl, memory: Memory, parts: Parts) -> None:
        self._domctl = domctl
        self._machine = domctl.machine
        self._memory = memory
        self._parts = parts
        self._localiser = Localiser(domctl, memory)
        self._p2m_frames = NO_PFNS  # those that the work ahead was for
        self._touched = np.zeros(memory.filled.size, bool)  # windows of frames

    def work_ahead(self) -> bool:
        """Pages of a live migration are still to come: do a part of what can be done without them.
        False if nothing can."""
        if self._localiser.work_ahead():
            return True
        memory, pfns, rows = self._memory, *self._p2m_due()
        there = memory.p2m[pfns] != _INVALID
        pfns, rows = pfns[there][:_P2M_BATCH], rows[there][:_P2M_BATCH]
        if rows.size:
            memory.write_early(pfns, local_p2m(memory.p2m, rows=rows))
            memory.moved[rows] = memory.came[pfns] = False
            return True
        windows = np.flatnonzero((memory.filled != 0) & ~self._touched)[:_TOUCH_BATCH]
        if windows.size:
            self._domctl.touch(memory.filled[windows])
            self._touched[windows] = True
        return windows.size > 0

    def run(self, state: DomainState) -> None:
        """All was read: finish the domain and commit it.

        The domain's process works off one thing while the next is got ready and asked for."""
        self._localiser.run()
        self._domctl.wait_begun()  # its errors are no fault of the page tables
        self._memory.give_back_pool()
        set_state = self._domctl.ask_set_state(state)
        with self._pinning():
            assert self._parts.p2m_frames is not None  # Reader.run saw to it
            self._memory.complete(self._parts.p2m_frames)
            self._write_shared_info()
            self._write_p2m()
            contexts = {vcpu_id: self._context(vcpu_id) for vcpu_id in sorted(self._parts.vcpus)}
            self._memory.serve()
            registers = contexts[0].user_regs
            with self._start_info(registers.rdx):
                registers.rdx, registers.rax = self._mfn(registers.rdx), 0
                set_vcpus = {
                    vcpu_id: self._domctl.ask_set_vcpu(self._vcpu_state(vcpu_id, context))
                    for vcpu_id, context in contexts.items()
                }
            committed = self._domctl.ask_commit()  # if nothing of this fails
        for vcpu_id, wait in set_vcpus.items():
            self._wait_for_vcpu(vcpu_id, wait)
        set_state()
        committed()

    # -- page tables ---

    @contextlib.contextmanager
    def _pinning(self) -> Iterator[None]:
        """The domain's process validates and pins the tables; what is wrong with them comes
        before what is wrong elsewhere."""
        wait = self._localiser.ask_pin()
        try:
            yield
        finally:
            self._wait_for_pins(wait)

    def _wait_for_pins(self, wait: Callable[[], object]) -> None:
        try:
            wait()
        except HostCannotTake as e:
            pfn = e.facts.get("pfn")
            offset = self._memory.offset_of(pfn) if isinstance(pfn, int) else None
            raise ImageError(
                f"the guest's page tables are inconsistent: {e}",
                offset=offset,
                record=PageBatch.NAME,
            ) from e

    # -- single pages ---

    def _mfn(self, pfn: int) -> int:
        return int(self._memory.p2m[pfn])

    def _require_plain(self, pfn: int, what: str, offset: int | None = None) -> None:
        """The pfn must be an ordinary page that is there."""
        memory = self._memory
        if pfn >= memory.p2m.size:
            raise ImageError(
                f"{what} is outside the p2m",
                offset=offset,
                expected=f"below {memory.p2m.size:#x}",
                found=f"{pfn:#x}",
            )
        if memory.types[pfn] != PageType.NOTAB or memory.p2m[pfn] == _INVALID:
            raise ImageError(
                f"{what} (pfn {pfn:#x}) has the wrong page type",
                offset=offset,
                expected="NOTAB",
                found=PageType(int(memory.types[pfn])).name,
            )

    def _write_shared_info(self) -> None:
        """vcpu_info and arch come from the image, the event channels start afresh."""
        content = self._parts.shared_info or bytes(PAGE_SIZE)
        shared = SharedInfo.from_buffer_copy(content)
        shared.arch.pfn_to_mfn_frame_list_list = 0
        ctypes.memset(shared.evtchn_pending, 0, ctypes.sizeof(shared.evtchn_pending))
        ctypes.memset(shared.evtchn_mask, 0xFF, ctypes.sizeof(shared.evtchn_mask))
        for info in shared.vcpu_info:
            info.evtchn_pending_sel = 0
        page = bytes(shared) + content[ctypes.sizeof(shared) :]
        self._machine.pages[self._domctl.shared_info_mfn] = np.frombuffer(page, np.uint8)

    def _write_p2m(self) -> None:
        frames = self._parts.p2m_frames
        assert frames is not None
        plain = (self._memory.types[frames] == PageType.NOTAB) & (
            self._memory.p2m[frames] != _INVALID
        )
        if not plain.all():
            wrong = int(frames[~plain][0])
            self._require_plain(wrong, "a p2m page", self._parts.p2m_offset)
        self._require_shared_are_holes(frames)
        pfns, rows = self._p2m_due()
        pages = local_p2m(self._memory.p2m, rows=rows).view(np.uint8)
        self._machine.write_frames(self._memory.p2m[pfns], pages, np.arange(rows.size))

    def _p2m_due(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the pfns of those p2m pages, none twice, that do not say yet where the frames
        are, and of each which of them it is."""
        memory, frames = self._memory, self._parts.p2m_frames
        if frames is None:
            return NO_PFNS, _NO_ROWS
        if frames is not self._p2m_frames:
            self._p2m_frames = frames
            memory.moved[:] = True
        rows = np.flatnonzero(memory.moved[: frames.size] | memory.came[frames])
        pfns, first = np.unique(frames[rows], return_index=True)
        return pfns, rows[first]

    def _require_shared_are_holes(self, frames: np.ndarray) -> None:
        """One p2m page may stand for many ranges of pfns only where all are holes."""
        _, where, counts = np.unique(frames, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(counts[where] > 1)
        pages = local_p2m(self._memory.p2m, rows=shared)
        wrong = shared[(pages != _INVALID).any(axis=1)]
        if wrong.size:
            raise ImageError(
                f"p2m page {wrong[0]} (pfn {frames[wrong[0]]:#x}) serves for others too",
                offset=self._parts.p2m_offset,
                record=libxc.X86PvP2mFrames.NAME,
            )

    @contextlib.contextmanager
    def _start_info(self, pfn: int) -> Iterator[None]:
        """Have the rings connected, and write start_info."""
        self._require_plain(pfn, "start_info (vCPU 0's rdx)", self._basic(0).offset)
        self._memory.have(np.array([pfn]))
        page = self._machine.pages[self._mfn(pfn)]
        info = StartInfo.from_buffer_copy(page.tobytes())
        for ring, field in (("xenstore", "store_mfn"), ("console", "console_mfn")):
            offset = (self._memory.offset_of(pfn) or 0) + getattr(StartInfo, field).offset
            self._require_plain(getattr(info, field), f"the {ring} ring in start_info", offset)
        info.store_mfn, info.console_mfn = self._mfn(info.store_mfn), self._mfn(info.console_mfn)
        connected = self._domctl.ask_connect_rings(info.store_mfn, info.console_mfn)
        yield
        info.store_evtchn, info.console_evtchn = connected()
        info.nr_pages = self._memory.p2m.size
        info.shared_info = self._domctl.shared_info_mfn << PAGE_SHIFT
        info.flags = 0
        page[: ctypes.sizeof(info)] = np.frombuffer(bytes(info), np.uint8)

    # -- vCPUs ---

    def _basic(self, vcpu_id: int) -> Item:
        return self._parts.vcpus[vcpu_id][libxc.X86PvVcpuBasic.NAME]

    def _context(self, vcpu_id: int) -> VcpuGuestContext:
        """Return the context with mfns in cr3, cr1 and the GDT frames."""
        item = self._basic(vcpu_id)
        context = VcpuGuestContext.from_buffer_copy(item.value.context)
        registers = context.ctrlreg
        registers[3] = self._root(registers[3] >> PAGE_SHIFT, "cr3", item) << PAGE_SHIFT
        if registers[1] & 1:
            registers[1] = self._root(registers[1] >> PAGE_SHIFT, "cr1", item) << PAGE_SHIFT
        else:
            registers[1] = 0
        if context.gdt_ents > _MAX_GDT_ENTRIES:
            raise ImageError(
                "too many GDT entries",
                offset=item.offset,
                record=item.value.NAME,
                expected=f"at most {_MAX_GDT_ENTRIES}",
                found=context.gdt_ents,
            )
        for i in range(-(-context.gdt_ents // 512)):
            self._require_plain(context.gdt_frames[i], f"GDT frame {i}", item.offset)
            context.gdt_frames[i] = self._mfn(context.gdt_frames[i])
        if not context.flags & _KERNEL_MODE:
            raise ImageError(
                f"vCPU {vcpu_id} was not in its kernel", offset=item.offset, record=item.value.NAME
            )
        return context

    def _root(self, pfn: int, register: str, item: Item) -> int:
        types = self._memory.types
        found = int(types[pfn]) if pfn < types.size else PageType.XTAB
        if found not in (PageType.L4TAB, PageType.L4TAB_PINNED):
            raise ImageError(
                f"{register} (pfn {pfn:#x}) has the wrong page type",
                offset=item.offset,
                record=item.value.NAME,
                expected="L4TAB",
                found=f"type {found:#x}",
            )
        return self._mfn(pfn)

    def _wait_for_vcpu(self, vcpu_id: int, wait: Callable[[], object]) -> None:
        try:
            wait()
        except HostCannotTake as e:
            is_xsave = e.facts.get("part") == "xsave"
            name = libxc.X86PvVcpuXsave.NAME if is_xsave else libxc.X86PvVcpuBasic.NAME
            item = self._parts.vcpus[vcpu_id][name]
            raise ImageError(
                f"the guest's state is inconsistent: {e}",
                offset=item.offset,
                record=item.value.NAME,
            ) from e

    def _vcpu_state(self, vcpu_id: int, context: VcpuGuestContext) -> VcpuState:
        def blob(record: str) -> bytes:
            item = self._parts.vcpus[vcpu_id].get(record)
            return bytes(item.value.context) if item else b""

        return VcpuState(
            vcpu_id=vcpu_id,
            context=bytes(context),
            extended=blob(libxc.X86PvVcpuExtended.NAME),
            xsave=blob(libxc.X86PvVcpuXsave.NAME),
            msrs=blob(libxc.X86PvVcpuMsrs.NAME),
        )
