"""The records of an x86 PV guest in a libxc stream; libxc.py has the others and the theory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from xsave.frames import PAGE_SIZE
from xsave.image.record import Record, blob, layout, rest, u8, u16, u32, u64s


@dataclass(frozen=True)
class X86PvInfo(Record):
    """Width of the guest in bytes and the levels of its page tables."""

    TYPE, NAME = 0x02, "X86_PV_INFO"
    LAYOUT = layout(guest_width=u8, pt_levels=u8, reserved1=u16, reserved2=u32)

    guest_width: int
    pt_levels: int
    reserved1: int = 0
    reserved2: int = 0

    def check(self, offset: int) -> None:
        """Refuse all but the two kinds of guest that exist."""
        if (self.guest_width, self.pt_levels) not in ((4, 3), (8, 4)):
            found = f"({self.guest_width}, {self.pt_levels})"
            self.refuse(offset, "wrong guest width and table levels", "(4, 3) or (8, 4)", found)


@dataclass(frozen=True, eq=False)
class X86PvP2mFrames(Record):
    """The pfns of the pages that hold p2m[start_pfn .. end_pfn], both included."""

    TYPE, NAME = 0x03, "X86_PV_P2M_FRAMES"
    LAYOUT = layout(start_pfn=u32, end_pfn=u32, pfns=u64s)

    start_pfn: int
    end_pfn: int
    pfns: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, X86PvP2mFrames) and self.encode() == other.encode()

    __hash__ = None  # type: ignore[assignment]

    def nr_frames(self, guest_width: int) -> int:
        """Return how many p2m pages this range takes in a guest of that width."""
        per_frame = PAGE_SIZE // guest_width
        return self.end_pfn // per_frame - self.start_pfn // per_frame + 1

    def check(self, offset: int) -> None:
        """Refuse a range that ends before it starts."""
        if self.start_pfn > self.end_pfn:
            start, end = f"at least {self.start_pfn:#x}", f"{self.end_pfn:#x}"
            self.refuse(offset, "end_pfn in front of start_pfn", start, end)


@dataclass(frozen=True)
class _Vcpu(Record):
    """What the four vCPU records share: whose state it is, and the state."""

    LAYOUT = layout(vcpu_id=u32, reserved=u32, context=rest)

    vcpu_id: int
    context: bytes = field(repr=False)
    reserved: int = 0


@dataclass(frozen=True)
class X86PvVcpuBasic(_Vcpu):
    """vcpu_guest_context: 5168 bytes of a 64-bit guest, 2800 of a 32-bit one."""

    TYPE, NAME = 0x04, "X86_PV_VCPU_BASIC"
    #: Bytes of the context by guest width.
    SIZES = {8: 5168, 4: 2800}

    def check(self, offset: int) -> None:
        """Refuse a context of neither size."""
        if len(self.context) not in self.SIZES.values():
            self.refuse(offset, "wrong context size", "5168 or 2800 bytes", len(self.context))


@dataclass(frozen=True)
class X86PvVcpuExtended(_Vcpu):
    """xen_domctl_ext_vcpucontext: sysenter and syscall32 entry points, machine check banks."""

    TYPE, NAME = 0x05, "X86_PV_VCPU_EXTENDED"

    def check(self, offset: int) -> None:
        """Refuse more than the 128 bytes that Xen takes."""
        if len(self.context) > 128:
            self.refuse(offset, "context too long", "at most 128 bytes", len(self.context))


@dataclass(frozen=True)
class X86PvVcpuXsave(_Vcpu):
    """u64 xcr0, u64 xcr0_accum, then an uncompressed XSAVE area; empty from old Xens."""

    TYPE, NAME = 0x06, "X86_PV_VCPU_XSAVE"

    def check(self, offset: int) -> None:
        """Refuse a context too short for the two masks."""
        if 0 < len(self.context) < 16:
            self.refuse(offset, "context too short", "at least 16 bytes", len(self.context))


@dataclass(frozen=True)
class X86PvVcpuMsrs(_Vcpu):
    """{u32 index, u32 reserved, u64 value} per MSR that is not zero."""

    TYPE, NAME = 0x0C, "X86_PV_VCPU_MSRS"

    def check(self, offset: int) -> None:
        """Refuse a context that is no whole number of MSRs."""
        if len(self.context) % 16:
            self.refuse(offset, "wrong context size", "a multiple of 16", len(self.context))


@dataclass(frozen=True)
class SharedInfo(Record):
    """The shared_info page as the source's Xen had it."""

    TYPE, NAME = 0x07, "SHARED_INFO"
    LAYOUT = layout(content=blob(PAGE_SIZE))

    content: bytes = field(repr=False)
