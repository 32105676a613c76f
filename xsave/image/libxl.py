"""The libxl stream, version 2: the middle layer of an image.

    LIBXL_STREAM ::= LIBXL_HEADER LIBXC_CONTEXT LIBXC_STREAM { EMULATOR_RECORD } END

The libxc stream follows the empty LIBXC_CONTEXT record inline and without a length of its own.
The header is big-endian, the records are little-endian. PV and PVH guests have no emulator.
reference: docs/specs/libxl-migration-stream.pandoc, tools/libs/light/libxl_sr_stream_format.h.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xsave.image.record import Layout, Record, layout, rest, u32, u32be, u64be

IDENT = 0x4C69_6278_6C46_6D74  # "LibxlFmt"
VERSION = 2
OPTION_BIG_ENDIAN = 1 << 0
OPTION_LEGACY = 1 << 1


@dataclass(frozen=True)
class LibxlHeader(Layout):
    """The 16 bytes in front of the libxl records."""

    NAME = "libxl header"
    LAYOUT = layout(ident=u64be, version=u32be, options=u32be)

    ident: int = IDENT
    version: int = VERSION
    options: int = 0

    def check(self, offset: int) -> None:
        """Refuse what libxl refuses."""
        if self.ident != IDENT:
            self.refuse(offset, "wrong ident", f"{IDENT:#x}", f"{self.ident:#x}")
        if self.version != VERSION:
            self.refuse(offset + 8, "unknown version", VERSION, self.version)
        if self.options & OPTION_BIG_ENDIAN:
            self.refuse(offset + 12, "wrong byte order", "little-endian", "big-endian")


@dataclass(frozen=True)
class LibxlEnd(Record):
    """The end of the image."""

    TYPE, NAME, LAYOUT = 0x0, "END", layout()


@dataclass(frozen=True)
class LibxcContext(Record):
    """The libxc stream follows."""

    TYPE, NAME, LAYOUT = 0x1, "LIBXC_CONTEXT", layout()


@dataclass(frozen=True)
class EmulatorXenstoreData(Record):
    """The emulator's xenstore keys: `content` is key NUL value NUL ... ."""

    TYPE, NAME = 0x2, "EMULATOR_XENSTORE_DATA"
    LAYOUT = layout(emulator_id=u32, index=u32, content=rest)

    emulator_id: int
    index: int
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class EmulatorContext(Record):
    """The emulator's own save file, opaque."""

    TYPE, NAME = 0x3, "EMULATOR_CONTEXT"
    LAYOUT = layout(emulator_id=u32, index=u32, content=rest)

    emulator_id: int
    index: int
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class CheckpointEnd(Record):
    """The libxl part of a checkpoint is over; the libxc stream goes on."""

    TYPE, NAME, LAYOUT = 0x4, "CHECKPOINT_END", layout()


@dataclass(frozen=True)
class CheckpointState(Record):
    """The state of a COLO secondary: 0 new, 1 suspended, 2 ready, 3 resumed.

    Some writers add four bytes of padding to the body: `content` keeps them.
    """

    TYPE, NAME = 0x5, "CHECKPOINT_STATE"
    LAYOUT = layout(id=u32, content=rest)

    id: int
    content: bytes = b""


RECORDS: dict[int, type[Record]] = {
    cls.TYPE: cls
    for cls in (
        LibxlEnd,
        LibxcContext,
        EmulatorXenstoreData,
        EmulatorContext,
        CheckpointEnd,
        CheckpointState,
    )
}
