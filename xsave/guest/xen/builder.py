"""The domain builder: an ELF kernel becomes a PV domain at its start of day.

Mirrors tools/libs/guest/xg_dom_{core,x86}.c. Physical layout, from pfn 0 upwards: kernel,
ramdisk, p2m list, start_info, store ring, console ring, page tables, boot stack; mapped from
virt_base on, with at least 512 KiB to spare, up to a 4 MiB boundary. Page tables are mapped
read-only and the L4 is pinned.

A kernel with a MOD_START_PFN note takes its ramdisk by pfn, one with an INIT_P2M note its p2m list
at that address: these lie behind all that is mapped from virt_base on. (Linux does not expect them
inside: it would leave what it cannot account for mapped, writable and executable.)

What no program header calls code is mapped no-execute. Xen's own builder does not care, but Linux
lives with its mapping until it has nearly booted, and the emulator looks for translated code at
every store to a page that may hold some.
"""

from __future__ import annotations

import ctypes

import numpy as np

from xsave.errors import HostCannotTake
from xsave.frames import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PTE_ACCESSED,
    PTE_DIRTY,
    PTE_NX,
    PTE_PRESENT,
    PTE_RW,
    PTE_USER,
)
from xsave.guest.xen import elf
from xsave.guest.xen.domain import Domain
from xsave.guest.xen.pagetypes import PGT_L4
from xsave.guest.xen.vcpu import FLAT_RING3_CS64, FLAT_RING3_SS64
from xsave.public import SIF_MOD_START_PFN, START_INFO_MAGIC, StartInfo

_FLAGS = PTE_PRESENT | PTE_RW | PTE_USER | PTE_ACCESSED | PTE_DIRTY
_SPARE_BYTES = 512 << 10
_ALIGN_BYTES = 4 << 20
_MAX_CMDLINE = 1023
_GUEST_UPPER_HALF = 0xFFFF_8800_0000_0000  # behind the last of XEN_L4_SLOTS


def build(
    domain: Domain,
    kernel: elf.Kernel,
    ramdisk: bytes,
    cmdline: str,
    nr_pages: int | None = None,
) -> None:
    """Fill the domain's frames and vCPU 0. nr_pages: how many it begins with; None: its maximum.

    Raises HostCannotTake if the memory is too small.
    """
    Builder(domain, kernel, ramdisk, cmdline, nr_pages or domain.max_pages).build()


class Builder:
    """The layout of one domain while it is being built; pfns count up from 0."""

    def __init__(
        self, domain: Domain, kernel: elf.Kernel, ramdisk: bytes, cmdline: str, nr_pages: int
    ) -> None:
        self.domain = domain
        self.machine = domain.machine
        self.kernel = kernel
        self.ramdisk = ramdisk
        self.cmdline = cmdline.encode()
        self.nr_pages = nr_pages
        self._lay_out()

    def _lay_out(self) -> None:
        if len(self.cmdline) > _MAX_CMDLINE:
            raise HostCannotTake(
                f"command line of {len(self.cmdline)} bytes: expected at most {_MAX_CMDLINE}"
            )
        notes = self.kernel.notes
        self.nr_p2m, nr_ramdisk = _pages(8 * self.nr_pages), _pages(len(self.ramdisk))
        # Either is laid out here, or, where the kernel can take it there, behind what is mapped.
        self.ramdisk_by_pfn = bool(notes.get(elf.NOTE_MOD_START_PFN))
        self.p2m_elsewhere = elf.NOTE_INIT_P2M in notes
        inside = [
            0 if self.ramdisk_by_pfn else nr_ramdisk,
            0 if self.p2m_elsewhere else self.nr_p2m,
        ]
        behind = nr_ramdisk + self.nr_p2m - sum(inside)
        self.ramdisk_pfn = _pages(self.kernel.end)
        self.p2m_pfn = self.ramdisk_pfn + inside[0]
        pfn = self.p2m_pfn + inside[1]
        self.start_info_pfn, self.store_pfn, self.console_pfn, self.tables_pfn = range(pfn, pfn + 4)
        nr_mapped, self.tables = self._plan_tables()
        self.stack_pfn = self.tables_pfn + len(self.tables)
        if self.stack_pfn + behind >= self.nr_pages:
            raise HostCannotTake(
                f"the domain has {self.nr_pages * 4} KiB of memory: its kernel, ramdisk and page "
                f"tables alone need {(self.stack_pfn + behind + 1) * 4} KiB"
            )
        pfn = min(nr_mapped, self.nr_pages - behind)
        if self.ramdisk_by_pfn:
            self.ramdisk_pfn, pfn = pfn, pfn + nr_ramdisk
        self.mappings = [(self.kernel.virt_base, 0, nr_mapped)]
        if self.p2m_elsewhere:
            self.p2m_pfn = pfn
            self.mappings.append((notes[elf.NOTE_INIT_P2M], self.p2m_pfn, self.nr_p2m))

    def _plan_tables(self) -> tuple[int, dict[tuple[int, int], int]]:
        """Map [virt_base, end) where end must also cover the tables themselves: iterate.

        Return how many pages that is, and the pfn of each table."""
        guess = 8
        while True:
            end = (self.tables_pfn + guess + 1 << PAGE_SHIFT) + _SPARE_BYTES
            end = -(-end // _ALIGN_BYTES) * _ALIGN_BYTES
            nr_mapped = min(end >> PAGE_SHIFT, self.nr_pages)
            ranges = [(self.kernel.virt_base, nr_mapped)]
            if self.p2m_elsewhere:
                ranges.append((self.kernel.notes[elf.NOTE_INIT_P2M], self.nr_p2m))
            for va, nr in ranges:
                _check_range(va, nr)
            keys = _table_keys(ranges)
            if len(keys) <= guess:
                return nr_mapped, {k: self.tables_pfn + i for i, k in enumerate(keys)}
            guess = len(keys)

    def build(self) -> None:
        domain = self.domain
        self.p2m = domain.allocate(self.nr_pages)
        self.machine.m2p[self.p2m] = np.arange(self.nr_pages, dtype=np.uint64)
        for segment in self.kernel.segments:
            end = segment.offset + segment.file_bytes
            self._write(segment.paddr, memoryview(self.kernel.data)[segment.offset : end])
        self._write(self.ramdisk_pfn << PAGE_SHIFT, self.ramdisk)
        self._write(self.p2m_pfn << PAGE_SHIFT, self.p2m.tobytes())
        self._write_tables()
        self._write_start_info()
        self._start_vcpu()

    def _write(self, paddr: int, data: bytes | memoryview) -> None:
        """Copy bytes to guest-physical memory. Raises HostCannotTake, StorageError."""
        if not data:
            return
        pfn, offset = paddr >> PAGE_SHIFT, paddr & 0xFFF
        if pfn + _pages(offset + len(data)) > self.nr_pages:
            raise HostCannotTake(f"the kernel wants memory at {paddr:#x}, beyond the domain's end")
        content, pages = np.frombuffer(data, np.uint8), self.machine.pages
        if offset:
            head, content = content[: PAGE_SIZE - offset], content[PAGE_SIZE - offset :]
            pages[self.p2m[pfn], offset : offset + head.size] = head
            pfn += 1
        nr = content.size >> PAGE_SHIFT
        rows, tail = content[: nr << PAGE_SHIFT].reshape(nr, PAGE_SIZE), content[nr << PAGE_SHIFT :]
        self.machine.write_frames(self.p2m[pfn : pfn + nr], rows, np.arange(nr))
        if tail.size:
            pages[self.p2m[pfn + nr], : tail.size] = tail

    def _write_tables(self) -> None:
        mem, p2m = self.machine.mem, self.p2m
        own = np.zeros(self.nr_pages, bool)
        own[list(self.tables.values())] = True
        code = self._code()
        for (level, key), pfn in self.tables.items():
            if level < PGT_L4:
                parent = self.tables[(level + 1, key >> 9)]
                mem[p2m[parent], key & 511] = (int(p2m[pfn]) << PAGE_SHIFT) | _FLAGS
        for va, first, nr in self.mappings:
            pfns = np.arange(first, first + nr)
            entries = (p2m[pfns] << np.uint64(PAGE_SHIFT)) | np.uint64(_FLAGS)
            entries[own[pfns]] &= ~np.uint64(PTE_RW)
            entries[~code[pfns]] |= np.uint64(PTE_NX)
            index = ((va & (1 << 48) - 1) >> PAGE_SHIFT) + np.arange(nr)
            keys, slots = index >> 9, index & 511
            tables = np.array([self.tables[(1, int(k))] for k in np.unique(keys)])
            mem[p2m[tables[keys - keys[0]]], slots] = entries

    def _code(self) -> np.ndarray:
        """Return (nr_pages,) bool: the pages that may hold code, all if no segment has any."""
        code = np.zeros(self.nr_pages, bool)
        for segment in self.kernel.segments:
            if segment.executable:
                end = _pages(segment.paddr + segment.memory_bytes)
                code[segment.paddr >> PAGE_SHIFT : end] = True
        return code if code.any() else ~code

    def _write_start_info(self) -> None:
        domain, base = self.domain, self.kernel.virt_base
        info = StartInfo(
            magic=START_INFO_MAGIC,
            nr_pages=self.nr_pages,
            shared_info=domain.shared_info_mfn << PAGE_SHIFT,
            store_mfn=int(self.p2m[self.store_pfn]),
            store_evtchn=domain.connect_store(int(self.p2m[self.store_pfn])),
            console_mfn=int(self.p2m[self.console_pfn]),
            console_evtchn=domain.connect_console(int(self.p2m[self.console_pfn])),
            pt_base=base + (self.tables[(PGT_L4, 0)] << PAGE_SHIFT),
            nr_pt_frames=len(self.tables),
            cmd_line=self.cmdline,
            first_p2m_pfn=self.p2m_pfn,
            nr_p2m_frames=self.nr_p2m,
        )
        info.mfn_list = self.kernel.notes.get(
            elf.NOTE_INIT_P2M, base + (self.p2m_pfn << PAGE_SHIFT)
        )
        if self.ramdisk:
            info.mod_len = len(self.ramdisk)
            info.mod_start = base + (self.ramdisk_pfn << PAGE_SHIFT)
            if self.ramdisk_by_pfn:
                info.flags |= SIF_MOD_START_PFN
                info.mod_start = self.ramdisk_pfn
        self._write(self.start_info_pfn << PAGE_SHIFT, bytes(info))
        assert ctypes.sizeof(info) <= PAGE_SIZE

    def _start_vcpu(self) -> None:
        domain, base = self.domain, self.kernel.virt_base
        vcpu = domain.vcpus[0]
        context, regs = vcpu.context, vcpu.context.user_regs
        l4 = int(self.p2m[self.tables[(PGT_L4, 0)]])
        for rc in (domain.tables.pin(l4, PGT_L4), domain.tables.get_type(l4, PGT_L4)):
            if rc:
                raise HostCannotTake(f"the built page tables were refused ({rc})")
        context.ctrlreg[3] = l4 << PAGE_SHIFT
        regs.rip, regs.cs, regs.ss = self.kernel.entry, FLAT_RING3_CS64, FLAT_RING3_SS64
        regs.rsi = base + (self.start_info_pfn << PAGE_SHIFT)
        regs.rsp = base + (self.stack_pfn + 1 << PAGE_SHIFT)
        context.kernel_ss, context.kernel_sp = FLAT_RING3_SS64, regs.rsp


def _pages(nr_bytes: int) -> int:
    return -(-nr_bytes // PAGE_SIZE)


def _check_range(va: int, nr: int) -> None:
    """A guest has the lower half of the address space and, of the upper, what is above Xen's."""
    end = va + (nr << PAGE_SHIFT)
    upper = va >= _GUEST_UPPER_HALF and end <= 1 << 64
    if va & (PAGE_SIZE - 1) or not (upper or end <= 1 << 47):
        raise HostCannotTake(f"the kernel wants to be at {va:#x}-{end:#x}, where no guest can be")


def _table_keys(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (level, virtual address >> span) of every table these (address, pages) need, L4
    first."""
    keys: dict[tuple[int, int], None] = {(PGT_L4, 0): None}
    for va, nr in ranges:
        va &= (1 << 48) - 1
        last = va + (nr << PAGE_SHIFT) - 1
        for level, shift in ((3, 39), (2, 30), (1, 21)):
            for key in range(va >> shift, (last >> shift) + 1):
                keys[(level, key)] = None
    return sorted(keys, reverse=True)
