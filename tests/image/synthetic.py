"""A small image made from nothing: a correct 64-bit PV guest (synthetic_kinds.py has others).

    image = PvImage()                       # change one thing, then encode
    image.vcpus[0].user_regs.rax = 1
    data = image.encode("xl")
    data = image.encode("xl", lambda pieces: without(pieces, "SHARED_INFO"))   # pieces.py

The guest has 256 pfns of which the last 16 are ballooned out, a direct map, a user address space,
start_info, rings, GDT, two vCPUs with all their records. Nothing runs here, but every frame and
address that a restore looks at is there.
"""

from __future__ import annotations

import json
import struct

import numpy as np

from tests.image.pieces import Edit, Piece
from xsave import public
from xsave.image import libxc, libxl
from xsave.image.stream import PageBatch, StreamEncoder

NR_PFNS, NR_POPULATED = 256, 240
START_INFO, STORE, CONSOLE, P2M, GDT, CODE = range(1, 7)
STACKS = (7, 8)
L4, L4_USER, L3, L2, L1, L3_USER, L2_USER, L1_USER = range(16, 24)
DATA = 32
DIRECT_MAP = 0xFFFF_8880_0000_0000
USER_BASE = 0x40_0000
FLAGS, RW = 0x65, 0x2  # PRESENT, USER, ACCESSED, DIRTY
CONFIG = {
    "c_info": {"type": "pv", "name": "synthetic"},
    "b_info": {"max_vcpus": 2, "max_memkb": 1024, "target_memkb": 1024, "type.pv": {}},
}
CPUID = [
    (0, 0xFFFFFFFF, 0xD, 0x68747541, 0x444D4163, 0x69746E65),
    (1, 0xFFFFFFFF, 0x60FB1, 0x20800, 0xF6D83203, 0x1FC9C3F5),
    (0xD, 0, 7, 0, 0x340, 0),
    (0xD, 1, 5, 0, 0, 0),
    (0xD, 2, 0x100, 0x240, 0, 0),
    (0x80000000, 0xFFFFFFFF, 0x80000000, 0, 0, 0),
]
MSR_POLICY = [(0xCE, 0, 0), (0x10A, 0, 0)]


def direct(pfn, inside=0):
    """Return the address of a page in the direct map."""
    return DIRECT_MAP + 4096 * pfn + inside


class Image:
    """What all guests have: pages and types by pfn, a configuration, and the wrapping."""

    guest_type = libxc.TYPE_X86_PV
    version = 3
    batch = 100

    def __init__(self):
        rng = np.random.default_rng(7)
        self.pages = np.zeros((NR_PFNS, 4096), np.uint8)
        self.pages[DATA:NR_POPULATED] = rng.integers(0, 256, (NR_POPULATED - DATA, 4096), np.uint8)
        self.types = np.zeros(NR_PFNS, np.uint8)
        self.types[NR_POPULATED:] = 0xF
        self.config = json.loads(json.dumps(CONFIG))
        self.cpuid = list(CPUID)
        self.msr_policy = list(MSR_POLICY)
        self.tsc = libxc.X86TscInfo(0, 2596122, 4727808799, 1)
        self.tail = b""

    def batches(self, pfns=None):
        """Return the PAGE_DATA records of these pfns (default: all)."""
        pfns = np.arange(NR_PFNS) if pfns is None else np.array(pfns)
        parts = np.split(pfns, range(self.batch, len(pfns), self.batch))
        return [self.record(self.page_batch(part)) for part in parts]

    def page_batch(self, pfns):
        """Return one batch."""
        types = self.types[pfns]
        return PageBatch(pfns.astype(np.uint64), types, self.pages[pfns[types < 0xD]])

    @staticmethod
    def record(value):
        """Return a record as a piece."""
        return Piece(value.NAME, StreamEncoder.record(value))

    def policies(self):
        """Return the policy records, none in version 2."""
        if self.version < 3:
            return []
        leaves = b"".join(struct.pack("<6I", *leaf) for leaf in self.cpuid)
        msrs = b"".join(struct.pack("<IIQ", *msr) for msr in self.msr_policy)
        values = libxc.X86CpuidPolicy(leaves), libxc.X86MsrPolicy(msrs), libxc.StaticDataEnd()
        return [self.record(value) for value in values]

    def body(self):
        """Return the records between the domain header and END."""
        raise NotImplementedError

    def emulator(self):
        """Return the libxl records behind the libxc stream."""
        return []

    def pieces(self, wrapping="xl"):
        """Return the whole image in pieces."""
        config = json.dumps(self.config).encode()
        head = StreamEncoder.headers(
            wrapping, config, guest_type=self.guest_type, version=self.version
        )
        inner = len(libxl.LibxlHeader().encode() + libxl.LibxcContext().encode())
        inner = (0 if wrapping == "libxc" else inner) + 40
        outer = [Piece("xl header", head[:-inner])] if wrapping == "xl" else []
        if wrapping != "libxc":
            outer += [Piece("libxl header", head[-inner : -inner + 16])]
            outer += [Piece("LIBXC_CONTEXT", head[-inner + 16 : -40])]
        outer += [Piece("image header", head[-40:-16]), Piece("domain header", head[-16:])]
        end = [] if wrapping == "libxc" else [*self.emulator(), Piece("libxl END", bytes(8))]
        return [*outer, *self.body(), Piece("END", bytes(8)), *end, Piece("tail", self.tail)]

    def encode(self, wrapping="xl", edit: Edit | None = None):
        """Return the image's bytes; `edit` may change the list of pieces first."""
        pieces = self.pieces(wrapping)
        return b"".join(piece.data for piece in (edit(pieces) if edit else pieces))


class PvImage(Image):
    """A PV guest. `everything` adds VERIFY with pages sent again and an unknown optional record."""

    width, levels, top = 8, 4, L4

    def __init__(self, nr_vcpus=2, everything=False):
        super().__init__()
        self.nr_vcpus = nr_vcpus
        self.everything = everything
        self.p2m_frames = np.array([P2M], np.uint64)
        self.end_pfn = NR_PFNS - 1
        self.resent: list[int] = []
        self._build_tables()
        self._build_boot_pages()
        self._build_vcpus()

    def table(self, pfn):
        """Return a page as 512 page-table entries, writable."""
        return self.pages[pfn].view("<u8")

    def _build_tables(self):
        tables = range(L4, L1_USER + 1)
        for pfn, page_type in zip(tables, (0xC, 0xC, 3, 2, 1, 3, 2, 1), strict=True):
            self.types[pfn] = page_type
        link = {(L4, 273): L3, (L3, 0): L2, (L2, 0): L1}
        link |= {(L4, 0): L3_USER, (L4_USER, 0): L3_USER}
        link |= {(L3_USER, 0): L2_USER, (L2_USER, 2): L1_USER}
        for (pfn, slot), below in link.items():
            self.table(pfn)[slot] = below << 12 | FLAGS | RW
        for pfn in range(NR_POPULATED):
            is_read_only = pfn in tables or pfn == GDT
            self.table(L1)[pfn] = pfn << 12 | FLAGS | (0 if is_read_only else RW)
        self.table(L1_USER)[:8] = [(DATA + i) << 12 | FLAGS | RW | 1 << 63 for i in range(8)]

    def _build_boot_pages(self):
        self.start_info = public.StartInfo.from_buffer(self.pages[START_INFO])
        self.start_info.magic = public.START_INFO_MAGIC
        self.start_info.nr_pages = NR_PFNS
        self.start_info.store_mfn, self.start_info.console_mfn = STORE, CONSOLE
        self.pages[P2M].view("<u8")[:] = 0xFFFF_FFFF_FFFF_FFFF
        self.shared_page = np.zeros(4096, np.uint8)
        self.shared_info = public.SharedInfo.from_buffer(self.shared_page)
        self.shared_info.arch.max_pfn = NR_PFNS
        for slot in self.shared_info.vcpu_info:
            slot.evtchn_upcall_mask = 1

    def _build_vcpus(self):
        self.vcpus = [_vcpu(number) for number in range(self.nr_vcpus)]
        self.vcpus[0].user_regs.rdx = START_INFO
        self.extended = [public.VcpuExtended(vcpu=n, size=64) for n in range(self.nr_vcpus)]
        self.xsave = [xsave_blob() for _ in range(self.nr_vcpus)]
        self.msrs = [struct.pack("<IIQ", 0x48, 0, 1) for _ in range(self.nr_vcpus)]

    def context(self, number):
        """Return vcpu_guest_context."""
        return bytes(self.vcpus[number])

    def body(self):
        record = self.record
        pieces = [record(libxc.X86PvInfo(self.width, self.levels)), *self.policies()]
        pieces += [record(libxc.X86PvP2mFrames(0, self.end_pfn, self.p2m_frames))]
        pieces += self.batches()
        if self.everything:
            pieces += [record(libxc.Verify()), *self.batches(range(DATA, DATA + 8))]
            pieces += [record(libxc.Unknown(0x8000_0042, b"optional"))]
        if self.resent:
            pieces += self.batches(self.resent)
        pieces += [record(self.tsc), record(libxc.SharedInfo(self.shared_page.tobytes()))]
        return pieces + [piece for n in range(self.nr_vcpus) for piece in self._vcpu_records(n)]

    def _vcpu_records(self, number):
        blobs = {
            libxc.X86PvVcpuBasic: self.context(number),
            libxc.X86PvVcpuExtended: bytes(self.extended[number]),
            libxc.X86PvVcpuXsave: self.xsave[number],
            libxc.X86PvVcpuMsrs: self.msrs[number],
        }
        return [self.record(cls(number, blob)) for cls, blob in blobs.items() if blob]


def _vcpu(number):
    """Return the context of a vCPU that is in its suspend hypercall."""
    vcpu = public.VcpuGuestContext()
    vcpu.flags = 0x3D
    regs = vcpu.user_regs
    regs.rip, regs.rsp = direct(CODE, 0x100), direct(STACKS[number], 0xF00)
    regs.cs, regs.ss, regs.rflags = 0xE033, 0xE02B, 0x1202
    for vector in (3, 13, 14, 0x80):
        trap = vcpu.trap_ctxt[vector]
        trap.vector, trap.flags, trap.cs, trap.address = vector, 4, 0x13, direct(CODE, 16 * vector)
    vcpu.gdt_frames[0], vcpu.gdt_ents = GDT, 16
    vcpu.kernel_ss, vcpu.kernel_sp = 0x1B, direct(STACKS[number] + 1)
    vcpu.ctrlreg[0], vcpu.ctrlreg[1], vcpu.ctrlreg[3] = 0x80050033, L4_USER << 12 | 1, L4 << 12
    vcpu.ctrlreg[4] = 0x50660
    vcpu.event_callback_eip = direct(CODE, 0x800)
    vcpu.failsafe_callback_eip = direct(CODE, 0x840)
    vcpu.syscall_callback_eip = direct(CODE, 0x880)
    vcpu.vm_assist, vcpu.gs_base_kernel = 0x2D, direct(DATA)
    return vcpu


def xsave_blob(xcr0=7, accum=7, area=832, bv=7, xcomp=0, reserved=0):
    """Return the blob of an XSAVE record."""
    blob = bytearray(struct.pack("<QQ", xcr0, accum) + bytes(area))
    if area >= 576:
        struct.pack_into("<QQQ", blob, 16 + 512, bv, xcomp, reserved)
    return bytes(blob)
