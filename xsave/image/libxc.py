"""The libxc stream, versions 2 and 3: headers and every record but PAGE_DATA (pages.py).

    LIBXC_STREAM ::= IMAGE_HEADER DOMAIN_HEADER { RECORD } END

The image header is always big-endian, all else little-endian (the header could say otherwise;
no reader takes that). Classes are named as in the spec and list their fields in its order.
Reserved fields are kept as read. `check` refuses what the reference reader refuses; what it
lets pass although it is wrong is for `verify`.
The records of a PV guest are in libxc_pv.py, those of the virtual x86 in libxc_x86.py; take all
of them from here.
reference: docs/specs/libxc-migration-stream.pandoc, tools/libs/guest/xg_sr_stream_format.h.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from xsave.frames import PAGE_SHIFT
from xsave.image.libxc_pv import (
    SharedInfo,
    X86PvInfo,
    X86PvP2mFrames,
    X86PvVcpuBasic,
    X86PvVcpuExtended,
    X86PvVcpuMsrs,
    X86PvVcpuXsave,
)
from xsave.image.libxc_x86 import (
    CpuidLeaf,
    HvmContext,
    HvmParams,
    MsrEntry,
    X86CpuidPolicy,
    X86MsrPolicy,
    X86TscInfo,
)
from xsave.image.pages import PageBatch
from xsave.image.record import Layout, Record, layout, rest, u16, u16be, u32, u32be, u64be, u64s

__all__ = [
    "Checkpoint",
    "CheckpointDirtyPfnList",
    "CpuidLeaf",
    "DomainHeader",
    "End",
    "HvmContext",
    "HvmParams",
    "ImageHeader",
    "MsrEntry",
    "PageBatch",
    "SharedInfo",
    "StaticDataEnd",
    "Toolstack",
    "Unknown",
    "Verify",
    "X86CpuidPolicy",
    "X86MsrPolicy",
    "X86PvInfo",
    "X86PvP2mFrames",
    "X86PvVcpuBasic",
    "X86PvVcpuExtended",
    "X86PvVcpuMsrs",
    "X86PvVcpuXsave",
    "X86TscInfo",
]

MARKER = 0xFFFF_FFFF_FFFF_FFFF
ID = 0x5845_4E46  # "XENF"
VERSION = 3
READABLE_VERSIONS = (2, 3)
OPTION_BIG_ENDIAN = 1 << 0
TYPE_X86_PV = 1
TYPE_X86_HVM = 2
DOMAIN_TYPES = {TYPE_X86_PV: "x86_pv", TYPE_X86_HVM: "x86_hvm"}


@dataclass(frozen=True)
class ImageHeader(Layout):
    """The first 24 bytes of a libxc stream."""

    NAME = "image header"
    LAYOUT = layout(
        marker=u64be, id=u32be, version=u32be, options=u16be, reserved1=u16be, reserved2=u32be
    )

    marker: int = MARKER
    id: int = ID
    version: int = VERSION
    options: int = 0
    reserved1: int = 0
    reserved2: int = 0

    def check(self, offset: int) -> None:
        """Refuse what libxc refuses."""
        if self.marker != MARKER:
            self.refuse(offset, "wrong marker", f"{MARKER:#x}", f"{self.marker:#x}")
        if self.id != ID:
            self.refuse(offset + 8, "wrong id", f"{ID:#x}", f"{self.id:#x}")
        if self.version not in READABLE_VERSIONS:
            self.refuse(offset + 12, "unknown version", "2 or 3", self.version)
        if self.options & OPTION_BIG_ENDIAN:
            self.refuse(offset + 16, "wrong byte order", "little-endian", "big-endian")


@dataclass(frozen=True)
class DomainHeader(Layout):
    """What kind of domain, and which Xen wrote it (major 0: the legacy converter)."""

    NAME = "domain header"
    LAYOUT = layout(type=u32, page_shift=u16, reserved=u16, xen_major=u32, xen_minor=u32)

    type: int
    page_shift: int = PAGE_SHIFT
    reserved: int = 0
    xen_major: int = 4
    xen_minor: int = 17

    def check(self, offset: int) -> None:
        """Refuse a domain of no known kind and pages of any but 4096 bytes."""
        if self.type not in DOMAIN_TYPES:
            self.refuse(offset, "unknown domain type", "1 (x86 PV) or 2 (x86 HVM)", self.type)
        if self.page_shift != PAGE_SHIFT:
            self.refuse(offset + 4, "wrong page shift", PAGE_SHIFT, self.page_shift)


@dataclass(frozen=True)
class End(Record):
    """The end of the libxc stream."""

    TYPE, NAME, LAYOUT = 0x00, "END", layout()


@dataclass(frozen=True)
class Toolstack(Record):
    """Deprecated: the toolstack's own blob (Xen 4.5 and converted images)."""

    TYPE, NAME, LAYOUT = 0x0B, "TOOLSTACK", layout(content=rest)

    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Verify(Record):
    """The pages that follow repeat earlier ones: a debugging aid of live migration."""

    TYPE, NAME, LAYOUT = 0x0D, "VERIFY", layout()


@dataclass(frozen=True)
class Checkpoint(Record):
    """A consistent set of records is complete (Remus, COLO)."""

    TYPE, NAME, LAYOUT = 0x0E, "CHECKPOINT", layout()


@dataclass(frozen=True, eq=False)
class CheckpointDirtyPfnList(Record):
    """The pfns a COLO secondary dirtied (back channel only)."""

    TYPE, NAME, LAYOUT = 0x0F, "CHECKPOINT_DIRTY_PFN_LIST", layout(pfns=u64s)

    pfns: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointDirtyPfnList) and self.encode() == other.encode()

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class StaticDataEnd(Record):
    """What never changes while a guest runs has been sent (version 3)."""

    TYPE, NAME, LAYOUT = 0x10, "STATIC_DATA_END", layout()


@dataclass(frozen=True)
class Unknown(Record):
    """A record of a type this reader does not know, of either layer; skipped if optional."""

    NAME, LAYOUT = "unknown record", layout(content=rest)

    type: int
    content: bytes = field(repr=False)

    @property
    def record_type(self) -> int:
        """The number in the record's header."""
        return self.type


RECORDS: dict[int, type[Record]] = {
    cls.TYPE: cls
    for cls in (
        End,
        X86PvInfo,
        X86PvP2mFrames,
        X86PvVcpuBasic,
        X86PvVcpuExtended,
        X86PvVcpuXsave,
        SharedInfo,
        X86TscInfo,
        HvmContext,
        HvmParams,
        Toolstack,
        X86PvVcpuMsrs,
        Verify,
        Checkpoint,
        CheckpointDirtyPfnList,
        StaticDataEnd,
        X86CpuidPolicy,
        X86MsrPolicy,
    )
}
