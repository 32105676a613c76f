"""More small images: a 32-bit PV guest, an HVM guest, a PVH guest."""

from __future__ import annotations

import struct

import numpy as np

from tests.image.synthetic import (
    CONSOLE,
    FLAGS,
    GDT,
    L1,
    L2,
    L3,
    NR_PFNS,
    NR_POPULATED,
    P2M,
    RW,
    START_INFO,
    STORE,
    Image,
    PvImage,
)
from xsave.image import libxc, libxl


class Pv32Image(PvImage):
    """A 32-bit PAE guest: three levels, other structures, no field of a vCPU but a few."""

    width, levels, top = 4, 3, L3

    def _build_tables(self):
        for pfn, page_type in {L3: 0xB, L2: 2, L1: 1}.items():
            self.types[pfn] = page_type
        self.table(L3)[3] = L2 << 12 | 1
        self.table(L2)[0] = L1 << 12 | FLAGS | RW
        for pfn in range(NR_POPULATED):
            is_read_only = pfn in (L3, L2, L1, GDT)
            self.table(L1)[pfn] = pfn << 12 | FLAGS | (0 if is_read_only else RW)

    def _build_boot_pages(self):
        page = self.pages[START_INFO]
        page[:15] = np.frombuffer(b"xen-3.0-x86_32p", np.uint8)
        struct.pack_into("<I", page, 0x20, NR_PFNS)
        struct.pack_into("<I", page, 0x2C, STORE)
        struct.pack_into("<I", page, 0x34, CONSOLE)
        self.pages[P2M].view("<u4")[:] = 0xFFFF_FFFF
        self.shared_page = np.zeros(4096, np.uint8)
        self.shared_page[1 : 32 * 64 : 64] = 1
        struct.pack_into("<I", self.shared_page, 0x90C, NR_PFNS)

    def _build_vcpus(self):
        self.contexts = [bytearray(2800) for _ in range(self.nr_vcpus)]
        for number, context in enumerate(self.contexts):
            struct.pack_into("<I", context, 0x20C, START_INFO if number == 0 else 0)
            struct.pack_into("<I", context, 0xA50, GDT)
            struct.pack_into("<I", context, 0xA90, 16)
            struct.pack_into("<I", context, 0xA9C + 12, L3 << 12)
        self.extended = [b"" for _ in self.contexts]
        self.xsave = self.msrs = self.extended

    def context(self, number):
        return bytes(self.contexts[number])


class HvmImage(Image):
    """An HVM guest with its emulator, or (`pvh=True`) a PVH guest without one."""

    guest_type = libxc.TYPE_X86_HVM

    def __init__(self, pvh=False):
        super().__init__()
        kind = "pvh" if pvh else "hvm"
        self.config["c_info"]["type"] = kind
        self.config["b_info"][f"type.{kind}"] = self.config["b_info"].pop("type.pv")
        self.context = [(1, 0, hvm_header()), (2, 0, bytes(1032)), (0, 0, b"")]
        self.params = [(1, STORE), (17, CONSOLE), (12, 0xFEFFE000)]
        self.pvh = pvh
        self.xenstore_data = b""

    def body(self):
        context = b"".join(struct.pack("<HHI", t, i, len(b)) + b for t, i, b in self.context)
        values = [self.tsc, libxc.HvmContext(context), libxc.HvmParams(tuple(self.params))]
        return [*self.policies(), *self.batches(), *map(self.record, values)]

    def emulator(self):
        if self.pvh:
            return []
        values = [libxl.EmulatorContext(2, 0, b"QEVM" + bytes(60))]
        if self.xenstore_data:
            values.insert(0, libxl.EmulatorXenstoreData(2, 0, self.xenstore_data))
        return [self.record(value) for value in values]


def hvm_header(magic=0x54381286):
    """Return the body of the first entry of an HVM context."""
    return struct.pack("<IIQII", magic, 1, 0, 0x60FB1, 2596122)
