"""A hostile kernel of one seed: an ELF file that does a few hundred bad things, one by one.

Before each it notes where the next one begins; every trap, system call and event leads there. So
what survives a deed goes on with the next. How it ends is drawn, too: at rest, in a loop that
never crosses into the hypervisor or does nothing else, or by a shutdown.
"""

from __future__ import annotations

import random
import struct

from tests.fuzz.guest import layout
from tests.fuzz.guest.deeds import DEEDS, WEIGHTS
from tests.fuzz.guest.instructions import LOOPS
from tests.fuzz.guest.layout import NEXT, REPAIR, SHARED, SHARED_INFO_MADDR, STACK_TOP, va
from tests.fuzz.guest.machinecode import Code, Value
from tests.fuzz.guest.values import Values
from tests.guest.elves import make_elf, notes
from xsave.guest.xen.vcpu import FLAT_RING3_CS64, FLAT_RING3_SS64
from xsave.public import SharedInfo, StartInfo

_CODE_BYTES = (layout.KERNEL_PAGES - layout.CODE_PFN) << 12
_DATA_BYTES = (layout.KERNEL_PAGES - layout.DATA_PFN) << 12
_LONGEST_DEED = 8192
_NOTE_BYTES = 20
#: How many deeds begin by making good what earlier ones broke: else most guests die young.
_REPAIRED = 0.6
_VECTORS = (*range(32), 0x80, 0x82)
_ENDS = ("spin", "spin", "block", "shutdown", "suspend", "crash", *LOOPS)


class HostileKernel:
    """One kernel. `suspends`: it ends in one suspend after the other, to be saved."""

    def __init__(self, seed, strangers, *, suspends=False, only=None):
        """strangers: frames that will not be its own; only: the deeds to choose from."""
        self.rng = random.Random(seed)
        self.values = Values(self.rng, strangers)
        self.names = []  # of its deeds, in order
        self.data = bytearray()  # what deeds want to have in memory: at layout.DATA_PFN
        self._deeds = only or tuple(DEEDS)
        self.code = Code(va(layout.CODE_PFN))
        self._program(suspends)

    # -- for the deeds ---

    def keep(self, blob):
        """Put bytes into the guest's memory; return their address, 0 without room."""
        if len(self.data) + len(blob) > _DATA_BYTES:
            return 0
        address = va(layout.DATA_PFN, len(self.data))
        self.data += blob
        return address

    def word(self, letter):
        """A word for a letter of a shape."""
        return self.values.word(letter)

    # -- the file ---

    def elf(self):
        """The ELF file."""
        segments = [
            (layout.START_PFN << 12, self._start(), 4096),
            (layout.WORDS_PFN << 12, bytes(8), 4096),
            (layout.TRAPS_PFN << 12, self._traps(), 4096),
            (layout.CODE_PFN << 12, bytes(self.code.blob), _CODE_BYTES),
            (layout.DATA_PFN << 12, bytes(self.data), _DATA_BYTES),
        ]
        return make_elf(segments, notes(layout.BASE))

    def _program(self, suspends):
        code, rng = self.code, self.rng
        for _ in range(rng.choice((5, 30, 100, 200))):
            if len(code.blob) > _CODE_BYTES - 3 * _LONGEST_DEED:
                break
            (name,) = rng.choices(self._deeds, [WEIGHTS.get(deed, 1) for deed in self._deeds])
            self.names.append(name)
            self._deed(DEEDS[name])
        self._note_next(code.here + _NOTE_BYTES)
        end = "suspend" if suspends else rng.choice(_ENDS)
        getattr(self, "_end_" + end, lambda: code.raw(LOOPS[end]))()
        self.names.append("end: " + end)
        code.raw(LOOPS["spin"])

    def _deed(self, deed):
        """Note where the next begins, then do it. The address is known only afterwards."""
        code = self.code
        at = len(code.blob)
        self._note_next(0)
        if self.rng.random() < _REPAIRED:
            code.set_rsp(STACK_TOP)
            code.load(REPAIR)
            code.raw(b"\xff\xd0")
        deed(self)
        code.blob[at + 2 : at + 10] = struct.pack("<Q", code.here)

    def _note_next(self, address):
        self.code.load(Value(address))
        self.code.raw(b"\x48\xa3" + struct.pack("<Q", NEXT))

    def suspend(self):
        """SCHEDOP_shutdown(suspend), most often with all that a save asks of a guest: the frame
        lists of its p2m, pages instead of frames in start_info, shared_info not mapped."""
        code, rng = self.code, self.rng
        arch = SHARED + SharedInfo.arch.offset
        code.hypercall(14, SHARED, Value(7, SHARED_INFO_MADDR), 2)
        code.store(arch, rng.choice((layout.NR_PAGES,) * 8 + (0, 1, 1 << 40, self.word("?"))))
        code.store(arch + 8, layout.mfn(layout.LISTS_PFN) if rng.random() < 0.9 else self.word("f"))
        code.store(va(layout.LISTS_PFN), layout.mfn(layout.LISTS_PFN + 1))
        for page in range(2):
            code.store(va(layout.LISTS_PFN + 1, 8 * page), layout.mfn(layout.P2M_PFN + page))
        fields = {"store_mfn": layout.STORE_PFN, "console_mfn": layout.CONSOLE_PFN}
        for name, pfn in fields.items():
            offset = getattr(StartInfo, name).offset
            code.store(va(layout.START_INFO_PFN, offset), pfn)
        if rng.random() < 0.9:
            code.hypercall(14, SHARED, 0, 2)
        code.store(layout.SCRATCH, 2)
        good = layout.mfn(layout.START_INFO_PFN)
        third = good if rng.random() < 0.85 else self.word(rng.choice("f?vk"))
        code.hypercall(29, 2, layout.SCRATCH, third)

    def _end_block(self):
        self.code.hypercall(29, 1, 0)

    def _end_shutdown(self):
        self.code.store(layout.SCRATCH, self.rng.choice((0, 1, 3, 4, 5)))
        self.code.hypercall(29, 2, layout.SCRATCH)

    def _end_suspend(self):
        again = self.code.here
        self.suspend()
        self.code.back_to(again)

    def _end_crash(self):
        self.code.hypercall(0, 0)
        self.code.raw(b"\x0f\x0b")

    # -- the runtime ---

    def _traps(self):
        table = b"".join(
            struct.pack(
                "<BBHIQ", v, self.rng.choice((0, 3, 4, 7)), FLAT_RING3_CS64, 0, va(1, 0x400)
            )
            for v in _VECTORS
        )
        return table + bytes(16)

    def _start(self):
        """0: the start; 0x400: traps and system calls; 0x600: events; 0x800: repair."""
        start = Code(va(layout.START_PFN))
        start.set_rsp(STACK_TOP)
        start.load(REPAIR)
        start.raw(b"\xff\xd0")
        start.hypercall(21, 0, 2)  # writable page tables
        start.load(SHARED)
        start.raw(b"\xc6\x40\x01\x00")  # events may come
        start.load(self.code.base)
        start.raw(b"\xff\xe0")
        traps = Code(va(layout.START_PFN, 0x400))
        traps.set_rsp(STACK_TOP)
        traps.jump_through(NEXT)
        events = Code(va(layout.START_PFN, 0x600))
        events.load(SHARED)
        events.raw(b"\xc6\x00\x00\xc6\x40\x01\x00")
        events.set_rsp(STACK_TOP)
        events.jump_through(NEXT)
        parts = ((start, 0x400), (traps, 0x200), (events, 0x200), (self._repair(), 0))
        return b"".join(bytes(code.blob).ljust(nr, b"\x90") for code, nr in parts)

    def _repair(self):
        """Traps, callbacks, stack, and the mappings that all else needs; then ret."""
        code = Code(REPAIR)
        code.hypercall(0, va(layout.TRAPS_PFN))
        code.hypercall(4, va(1, 0x600), va(1, 0x400), va(1, 0x400))
        code.hypercall(3, FLAT_RING3_SS64, STACK_TOP)
        code.hypercall(14, SHARED, Value(7, SHARED_INFO_MADDR), 2)
        for pfn in (layout.SCRATCH_PFN, layout.CONTEXT_PFN, layout.CONTEXT_PFN + 1):
            code.hypercall(14, va(pfn), layout.entry(pfn, 0x67), 2)
        code.raw(b"\xc3")
        return code
